"""A second runtime: run an exported file in OpenVINO on the CPU, and see which layers are 8-bit there.

OpenVINO is an optional extra; without it everything else works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from metaaug_cli.errors import InputError
from metaaug_cli.verification.evaluation import ONNXRUNTIME, Predictor, Score, in_batches_of

OPENVINO = "openvino"
_LAYERS = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul"}
_EIGHT_BITS = {"u8", "i8"}
# bf16 is OpenVINO's own choice on CPUs that have it, also for what it leaves in float.
_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class OpenVinoLayers:
    """What OpenVINO runs after its own optimisation."""

    version: str
    integer: Annotated[int, Field(description="convolutions and linear layers that run as 8-bit")]
    layers: Annotated[int, Field(description="convolutions and linear layers")]
    float_layers: Annotated[tuple[str, ...], Field(description="those left in float")]


@dataclass(frozen=True)
class OpenVinoReport:
    """OpenVINO beside ONNX Runtime, the same file on the same images."""

    kernels: OpenVinoLayers
    agreement: Annotated[float, Field(description="images with ONNX Runtime's top-1 class, 0..1")]
    max_logit_difference: Annotated[float, Field(description="against ONNX Runtime")]


def open_openvino(path: Path) -> tuple[Predictor, OpenVinoLayers]:
    """Compile a file for the CPU.

    Returns:
        A predictor, and which layers it runs as 8-bit.

    Raises:
        InputError: OpenVINO is not installed, or refuses the file.
    """
    openvino = _load()
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", _SETTINGS)
    except RuntimeError as error:  # the only class it raises
        reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise InputError(
            f"OpenVINO {_version(openvino)} does not load {path}: {reason}",
            hint="it does not know 2-bit types: export with --pack int8",
        ) from error

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(next(iter(compiled(images.numpy()).values())).copy())

    batch = compiled.input(0).partial_shape[0]
    predictor = in_batches_of(batch.get_length(), predict) if batch.is_static else predict
    return predictor, _count(_version(openvino), compiled.get_runtime_model())


def summarize(kernels: OpenVinoLayers, scores: Mapping[str, Score]) -> OpenVinoReport:
    """OpenVINO's layers with its distance from ONNX Runtime, from an evaluation that ran both."""
    score = scores[OPENVINO]
    return OpenVinoReport(kernels, score.agreement[ONNXRUNTIME], score.max_logit_difference[ONNXRUNTIME])


def _load() -> Any:
    try:
        return import_module("openvino")
    except ImportError as error:
        raise InputError("--openvino: OpenVINO is not installed", hint="pip install openvino") from error


def _version(openvino: Any) -> str:
    return str(openvino.__version__).partition("-")[0]


def _count(version: str, model: Any) -> OpenVinoLayers:
    integer, floats = 0, []
    for node in model.get_ops():
        about = node.get_rt_info()
        if about["layerType"].astype(str) not in _LAYERS:
            continue
        if about["runtimePrecision"].astype(str) in _EIGHT_BITS:
            integer += 1
        else:
            floats.append(node.get_friendly_name())
    return OpenVinoLayers(version, integer, integer + len(floats), tuple(floats))
