"""What each ONNX Runtime release can do with codes under 8 bits, as measured by ``make matrix``.

One table of facts; ``tests/unit/deployment/test_runtimes.py`` holds it against the measurements in
``benchmarks/results/runtime-matrix.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto

from metaaug_cli.errors import UsageError

Release = tuple[int, int]
OLDEST, NEWEST = (1, 20), (1, 31)
"""First and last release that was measured."""

WITHOUT_INTEGER_KERNELS = {"session.disable_quant_qdq": "1"}
"""Session option that keeps ONNX Runtime from fusing 4-bit and 2-bit types into kernels it does not have."""

KEEP_FLOAT_WEIGHTS = {"optimization.disable_specified_optimizers": "WeightBiasQuantization"}
"""Session option that keeps ONNX Runtime from quantizing float weights behind codes by a rule of its own."""

_TYPES = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}


@dataclass(frozen=True)
class Support:
    """What a way of storing codes needs.

    Args:
        name: For people.
        exact: First release that loads it and computes what the file says.
        integer: First release whose integer kernels run it; None where none does.
        before: What releases before ``exact`` do with it.
    """

    name: str
    exact: Release
    integer: Release | None
    before: str = ""


SUPPORT = {
    "8 bits": Support("8-bit codes", (1, 20), (1, 20)),
    "packed 4 bits": Support(
        "packed 4-bit weights", (1, 23), (1, 23), "refuse the file: they cannot cast from uint4"
    ),
    "packed 2 bits": Support(
        "packed 2-bit weights", (1, 24), (1, 25), "refuse the file: they do not know the types"
    ),
    # Until microsoft/onnxruntime#32611 a buffer of packed codes could be reused for twice as many bytes.
    "native 4 bits": Support(
        "4-bit ONNX types", (1, 31), None, "load the file and compute wrong logits at some batch sizes"
    ),
    "native 2 bits": Support(
        "2-bit ONNX types", (1, 31), None, "refuse the file, or compute wrong logits at some batch sizes"
    ),
}


def storage_of(model: onnx.ModelProto) -> list[str]:
    """The ways a file stores codes, as keys of ``SUPPORT``."""
    types = {i.name: i.data_type for i in model.graph.initializer}
    unpacked = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    found = {
        f"{'packed' if name in unpacked else 'native'} {_TYPES[kind]} bits"
        for name, kind in types.items()
        if kind in _TYPES
    }
    return [key for key in SUPPORT if key in found] or ["8 bits"]


def least_release(model: onnx.ModelProto) -> str:
    """Oldest release that runs a file as well as any: exactly, and as integers where some release can.

    None before 1.20 was tried.
    """
    return format_release(max(s.integer or s.exact for s in (SUPPORT[key] for key in storage_of(model))))


def choose_pack(weight_bits: Collection[int], release: Release) -> Literal["int8", "packed", "packed4"]:
    """The smallest form that a release runs as integers.

    What packing stores follows from the codes, which may need fewer bits than their grid has: a 3-bit layer
    whose codes are all 3 fits uint2. So the release alone decides how narrow the storage may become.

    Args:
        weight_bits: Bits of the network's weight grids; without any up to 4 there is nothing to pack.
        release: The release it has to run on.
    """
    if not any(bits <= 4 for bits in weight_bits) or not _runs(SUPPORT["packed 4 bits"], release):
        return "int8"
    return "packed" if _runs(SUPPORT["packed 2 bits"], release) else "packed4"


def require_integer(model: onnx.ModelProto, release: Release) -> None:
    """Refuse a file that a release does not run on integer kernels.

    Raises:
        UsageError: It would not load there, compute something else, or run in float.
    """
    stored = storage_of(model)
    target = format_release(release)
    hint = f"{_alternative(stored, release)} runs as integers in {target}"
    for support in (SUPPORT[key] for key in stored if release < SUPPORT[key].exact):
        raise UsageError(
            f"--target-ort {target}: {support.name} need ONNX Runtime "
            f"{format_release(support.integer or support.exact)}; "
            f"releases before {format_release(support.exact)} {support.before}",
            hint=hint,
        )
    for support in (SUPPORT[key] for key in stored if not _runs(SUPPORT[key], release)):
        reason = (
            f"ONNX Runtime has no integer kernels for {support.name}; the file would run in float"
            if support.integer is None
            else f"{support.name} fully run as integers from {format_release(support.integer)} on"
        )
        raise UsageError(f"--target-ort {target}: {reason}", hint=hint)


def _alternative(stored: Collection[str], release: Release) -> str:
    """The flags of a form that a release runs, in place of one that it does not."""
    other = choose_pack([int(key.split()[-2]) for key in stored], release)
    return "storage in 4 bits, which leaving --pack out gives," if other == "packed4" else f"--pack {other}"


def _runs(support: Support, release: Release) -> bool:
    return support.integer is not None and release >= support.integer


def parse_release(text: str) -> Release:
    """Read ``1.22`` or ``1.22.1``.

    Raises:
        UsageError: It is no version, or one older than any that was measured.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", text.strip())
    if match is None:
        raise UsageError(f"--target-ort {text} is not a version", hint="write it like --target-ort 1.22")
    release = (int(match[1]), int(match[2]))
    if release < OLDEST:
        raise UsageError(
            f"--target-ort {text}: nothing before ONNX Runtime {format_release(OLDEST)} was measured",
            hint="leave --target-ort out and test the file on that release yourself",
        )
    return release


def installed_release(version: str) -> Release:
    """(major, minor) of a library's own version text, which may end in ``.dev`` and the like."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def format_release(release: Release) -> str:
    """``1.22`` for (1, 22)."""
    return f"{release[0]}.{release[1]}"
