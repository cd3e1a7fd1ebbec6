"""Write a deployed network as a QDQ ONNX file that ONNX Runtime runs with integer kernels."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx
import onnx_ir as ir
import torch
from torch import nn

from metaaug_cli.deployment import onnx_passes
from metaaug_cli.deployment import packing as packing_passes
from metaaug_cli.deployment.manifest import Manifest, write_manifest
from metaaug_cli.deployment.onnx_movement import move_codes
from metaaug_cli.deployment.packing import PackMode
from metaaug_cli.deployment.qdq_ops import translation_table
from metaaug_cli.deployment.runtimes import Release, require_integer
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import GraphError, UsageError
from metaaug_cli.files import write_atomically

OPSET, IR_VERSION = 21, 10
INPUT_NAME, OUTPUT_NAME = "input", "logits"
_PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class ExportResult:
    """A file that was written.

    Args:
        path: Where it lies.
        size_bytes: Its size.
        float_bytes: Size of the network's weights and biases in float32.
        manifest: The manifest as stored in the file.
    """

    path: Path
    size_bytes: int
    float_bytes: int
    manifest: Manifest


def export_onnx(
    module: nn.Module,
    *,
    input_size: tuple[int, int, int],
    path: Path | str,
    manifest: Manifest,
    pack: PackMode = "int8",
    reduce_range: bool = False,
    target: Release | None = None,
) -> ExportResult:
    """Export a deployed module to ONNX and check the file.

    Args:
        module: Network of the operators in ``qdq_ops`` and ATen ones, (N, C, H, W) to (N, classes), or
            its integer simulation.
        input_size: (C, H, W) of its input.
        path: File to write; an existing one is replaced in one step.
        manifest: Stored in the file's metadata, with what packing adds to it.
        pack: How codes under 8 bits are stored.
        reduce_range: Make 8-bit weights exact on x86 without VNNI, at the price of slower kernels.
        target: ONNX Runtime release that must run it on integer kernels.

    Raises:
        GraphError: The module cannot be exported, or the file does not pass the ONNX checker.
        InputError: The file cannot be written.
        UsageError: ``pack`` is unknown, or the target cannot run what it asks for; nothing is written.
    """
    if pack not in get_args(PackMode):
        raise UsageError(f"pack {pack!r} is unknown", hint=f"use one of: {', '.join(get_args(PackMode))}")
    path = Path(path)
    proto = ir.to_proto(build_model(module, input_size))
    packing = packing_passes.pack(proto, pack, reduce_range=reduce_range)
    if target is not None:
        require_integer(proto, target)
    manifest = manifest.model_copy(update={"packing": packing})
    write_manifest(proto, manifest)
    check_model(proto)
    write_atomically(path, proto.SerializeToString(deterministic=True))
    return ExportResult(path, path.stat().st_size, _float_bytes(module), manifest)


def build_model(module: nn.Module, input_size: tuple[int, int, int]) -> ir.Model:
    """The exported graph in its final form, in memory."""
    model = _trace(module.deployed if isinstance(module, IntegerSimulation) else module, input_size)
    onnx_passes.simplify(model)
    onnx_passes.fold_zero_padding(model)
    move_codes(model)
    onnx_passes.add_weight_zero_points(model)
    onnx_passes.name_tensors(model)
    onnx_passes.remove_unused(model)
    _require_dynamic_batch(model)
    model.producer_name, model.producer_version = "metaaug", None
    model.graph.name = "quantized"
    return model


def _trace(module: nn.Module, input_size: tuple[int, int, int]) -> ir.Model:
    example = torch.zeros(2, *input_size)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translation_table(),
                dynamic_shapes=({0: batch},),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; all mean "cannot be written as ONNX"
        raise _untranslatable(error) from error
    assert program is not None
    program.model.ir_version = IR_VERSION
    return program.model


def _untranslatable(error: Exception) -> GraphError:
    """What the exporter tells in a chain of reports, in one line: the operator and the reason."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    named = re.search(r"target=torch\.ops\.([\w.]+)\]", "\n".join(map(str, chain)))
    operator = named[1].removesuffix(".default") if named else ""
    if not operator:
        reason = _first_line(error)
    elif any("No ONNX function found" in str(e) for e in chain):
        reason = f"the operator {operator} has no ONNX form"
    else:
        reason = f"the operator {operator}: {_first_line(chain[-1])}"
    return GraphError(
        f"the quantized network cannot be written as ONNX: {reason}",
        hint="compute the same in the network's forward with other operators, and quantize it again; "
        "--debug shows the whole report",
    )


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about missing optional packages off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _float_bytes(module: nn.Module) -> int:
    """Bytes of the parameters in float32: codes of weights and biases count four bytes, their scales none."""
    codes = (t for n, t in module.state_dict().items() if n.endswith("codes") or not n.endswith("scale"))
    return sum(4 * t.numel() for t in codes)


def _require_dynamic_batch(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and isinstance(value.shape[0], int):
            raise GraphError(
                f"the exported network fixes its batch size to {value.shape[0]} at {value.name}",
                hint="make the network's forward independent of the batch size (no fixed batch in a view)",
            )


def check_model(proto: onnx.ModelProto) -> None:
    """Run the ONNX checker with full shape inference.

    Raises:
        GraphError: The model does not pass, or is too large for one file.
    """
    if proto.ByteSize() > _PROTOBUF_LIMIT:
        raise GraphError("the exported network is larger than 2 GiB, the limit of one ONNX file")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise GraphError(f"the exported file does not pass the ONNX checker: {error}") from error
    except onnx.shape_inference.InferenceError as error:
        raise GraphError(f"shapes of the exported file do not agree: {error}") from error
