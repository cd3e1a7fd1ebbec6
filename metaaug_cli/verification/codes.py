"""The codes that ONNX Runtime and the simulation compute at every activation quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from metaaug_cli.deployment.manifest import read_manifest
from metaaug_cli.deployment.onnx_summary import load_onnx
from metaaug_cli.deployment.onnx_view import CodeTensor, code_tensors
from metaaug_cli.deployment.ort import open_session
from metaaug_cli.deployment.runtimes import WITHOUT_INTEGER_KERNELS
from metaaug_cli.deployment.simulation import run_integers
from metaaug_cli.errors import InputError

_EIGHT_BITS = {TensorProto.UINT8, TensorProto.INT8}
_UNSIGNED = {TensorProto.UINT8, TensorProto.UINT4, TensorProto.UINT2}
_STALE = "export the run again and check that file"


@dataclass(frozen=True)
class Worst:
    """One differing code: where it is and both values.

    Args:
        index: Image number, then position in the tensor.
        ours: Code of the simulation or reference.
        runtime: Code of ONNX Runtime.
        value: The simulation's value in steps of the quantizer before rounding, zero point included; None
            for the reference, which has no such number.
    """

    index: tuple[int, ...]
    ours: int
    runtime: int
    value: float | None = None

    def __str__(self) -> str:
        before = "" if self.value is None else f" (before rounding {self.value:.5f})"
        place = f"image {self.index[0]}, position {list(self.index[1:])}"
        return f"{place}: {self.ours}{before}, ONNX Runtime {self.runtime}"


@dataclass(frozen=True)
class Comparison:
    """Differing codes of one tensor.

    Args:
        mismatches: How many codes differ.
        max_steps: Largest difference in quantization steps.
        worst: The difference of that size that was met first.
    """

    mismatches: int = 0
    max_steps: int = 0
    worst: Worst | None = None

    def plus(self, later: Comparison) -> Comparison:
        """The comparison of both sets of codes."""
        larger = later if later.max_steps > self.max_steps else self
        return Comparison(self.mismatches + later.mismatches, larger.max_steps, larger.worst)

    def shifted(self, images: int) -> Comparison:
        """The same with image numbers counted from ``images`` on."""
        if self.worst is None:
            return self
        image, *place = self.worst.index
        return replace(self, worst=replace(self.worst, index=(image + images, *place)))


def compare_codes(ours: np.ndarray, runtime: np.ndarray, values: Tensor | None = None) -> Comparison:
    """Count differing codes.

    Args:
        ours: Codes of the simulation or reference.
        runtime: Codes of ONNX Runtime, of the same shape.
        values: What was rounded to ``ours``, in steps.

    Raises:
        InputError: The shapes differ, so these are not codes of the same tensor.
    """
    if ours.shape != runtime.shape:
        raise InputError(f"codes of shape {ours.shape} face ONNX Runtime's {runtime.shape}", hint=_STALE)
    steps = np.abs(ours.astype(np.int16) - runtime.astype(np.int16))
    mismatches = int(np.count_nonzero(steps))
    if not mismatches:
        return Comparison()
    at = np.unravel_index(int(steps.argmax()), steps.shape)
    value = None if values is None else float(values[at])
    worst = Worst(tuple(int(i) for i in at), int(ours[at]), int(runtime[at]), value)
    return Comparison(mismatches, int(steps[at]), worst)


class RuntimeCodes:
    """Runs a file in ONNX Runtime at full optimisation and reads the codes of every activation quantizer.

    Args:
        path: A QDQ file; session options that its manifest asks for are used.
        threads: ONNX Runtime's threads.

    ``batch`` is the number of images that the file asks for, None where any will do.

    Raises:
        InputError: The file cannot be read or opened.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.model = load_onnx(path)
        self.disturbance = 0.0
        self._input = self.model.graph.input[0].name
        sizes = self.model.graph.input[0].type.tensor_type.shape.dim
        self.batch = sizes[0].dim_value or None if sizes else None
        self._shape = tuple(size.dim_value for size in sizes[1:])
        self._output = self.model.graph.output[0].name
        manifest = read_manifest(self.model)
        options = manifest.packing.session_options if manifest else {}
        self.tensors = code_tensors(self.model)
        if WITHOUT_INTEGER_KERNELS.items() <= options.items():
            self.tensors = tuple(replace(tensor, exact=False) for tensor in self.tensors)
        self._plain = open_session(path, threads=threads, options=options)
        visible, self._visible_names = _with_visible_codes(self.model, self.tensors)
        self._visible = open_session(visible, threads=threads, options=options)

    def run(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and codes by quantizer name, of a batch of images (N, C, H, W).

        N is at most ``batch`` where the file fixes that.

        Raises:
            InputError: The file reads images of another shape.
        """
        fits = zip(self._shape, images.shape[1:], strict=False)
        if len(self._shape) != images.ndim - 1 or any(size not in (0, given) for size, given in fits):
            raise InputError(
                f"images of shape {images.shape[1:]} for a file that reads {self._shape}",
                hint="prepare them for the network that was exported",
            )
        count, missing = len(images), max((self.batch or 0) - len(images), 0)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        feed = {self._input: images}
        logits, *codes = self._visible.run([self._output, *self._visible_names], feed)
        (plain,) = self._plain.run([self._output], feed)
        self.disturbance = max(self.disturbance, float(np.abs(plain - logits).max(initial=0)))
        # rows are images, or tokens of images in order
        kept = [c[: len(c) * count // len(images)] for c in (plain, *codes)]
        return kept[0], {t.name: c for t, c in zip(self.tensors, kept[1:], strict=True)}


def _with_visible_codes(model: onnx.ModelProto, tensors: Iterable[CodeTensor]) -> tuple[bytes, list[str]]:
    """The model with its codes as further outputs, and the names of those outputs."""
    visible = onnx.ModelProto()
    visible.CopyFrom(model)
    names = []
    for tensor in tensors:
        name, onnx_type = tensor.tensor, tensor.onnx_type
        if onnx_type not in _EIGHT_BITS:  # Python has no arrays of less than 8 bits
            name = f"{tensor.tensor}/visible"
            onnx_type = TensorProto.UINT8 if onnx_type in _UNSIGNED else TensorProto.INT8
            visible.graph.node.append(helper.make_node("Cast", [tensor.tensor], [name], to=onnx_type))
        visible.graph.output.append(helper.make_tensor_value_info(name, onnx_type, None))
        names.append(name)
    return visible.SerializeToString(), names


def simulate(
    deployed: fx.GraphModule, images: Tensor, runtime: Mapping[str, np.ndarray], *, force: bool
) -> tuple[np.ndarray, dict[str, Comparison]]:
    """Logits of a deployed network, and its codes compared with the runtime's by quantizer name.

    Args:
        deployed: The network, on the CPU.
        images: Normalised images (N, C, H, W).
        runtime: ONNX Runtime's codes of the same images.
        force: Let every layer read the runtime's codes in place of the simulation's own.

    Raises:
        InputError: The network and the file have different quantizers.
    """
    found: dict[str, Comparison] = {}

    def compare(name: str, codes: Tensor, steps: Tensor) -> Tensor:
        if name not in runtime:
            raise InputError(f"the ONNX file has no codes of quantizer {name}", hint=_STALE)
        found[name] = compare_codes(codes.to(torch.uint8).numpy(), runtime[name], steps)
        return torch.from_numpy(runtime[name].astype(np.float32)) if force else codes

    logits = run_integers(deployed, images, compare)
    missing = sorted(runtime.keys() - found.keys())
    if missing or not found:
        raise InputError(
            f"the simulated network has no quantizer {', '.join(missing) or 'at all'}", hint=_STALE
        )
    return logits.numpy(), found
