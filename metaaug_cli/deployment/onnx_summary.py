"""What an ONNX file says about its own quantization, whichever tool wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from metaaug_cli.deployment.external_data import require_external_data
from metaaug_cli.deployment.manifest import Manifest, read_manifest
from metaaug_cli.deployment.onnx_view import WEIGHTED, CodeTensor, WeightTensor, code_tensors, weight_tensors
from metaaug_cli.deployment.packing import saturating_layers
from metaaug_cli.deployment.runtimes import least_release
from metaaug_cli.errors import InputError

# What ONNX Runtime defines in ONNX's own domain.
_RUNTIME_OPERATORS = {
    *("Affine", "Crop", "DynamicSlice", "GivenTensorFill", "ImageScaler", "MemcpyFromHost", "MemcpyToHost"),
    *("ParametricSoftplus", "Scale", "ScaledTanh", "SimplifiedLayerNormalization"),
}
_RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")  # ONNX Runtime's own


@dataclass(frozen=True)
class LayerSummary:
    """One quantized weight.

    Args:
        name: Name of the layer.
        op: Operator that reads it.
        bits: Bits of its codes.
        stored: Type they are stored in, ``uint4`` for one.
        symmetric: Whether zero points are 0 (or absorbed into the codes).
        shape: Shape of the weight.
        channels: Number of scales.
        least_scale: Smallest of them.
        greatest_scale: Largest of them.
        bias: ``int32`` for quantized, ``float`` for a plain one, None for none.
    """

    name: str
    op: str
    bits: int
    stored: str
    symmetric: bool
    shape: tuple[int, ...]
    channels: int
    least_scale: float
    greatest_scale: float
    bias: str | None


@dataclass(frozen=True)
class ActivationSummary:
    """One activation quantizer.

    Args:
        name: Name of the quantizer.
        bits: Bits of its codes.
        stored: Type of the codes.
        low: Least code that can occur.
        high: Greatest code that can occur.
        zero_point: Code of the value 0 (of the first channel, if there are several).
        scale: Step size (of the first channel).
        integer: Whether an integer kernel can make the codes.
    """

    name: str
    bits: int
    stored: str
    low: int
    high: int
    zero_point: int
    scale: float
    integer: bool


@dataclass(frozen=True)
class OnnxSummary:
    """A file's quantization.

    Args:
        path: The file.
        size_bytes: Its size.
        producer: Tool that wrote it.
        opset: Version of the ONNX operators.
        ir_version: Version of the file format.
        manifest: What metaaug noted about it; None for a file of another tool.
        layers: Quantized weights in graph order.
        activations: Activation quantizers in graph order.
        float_layers: Convolutions and linear layers whose weights are float.
        least_onnxruntime: Oldest ONNX Runtime release that reads the types of its codes; operators, opset and
            IR version may need a newer one.
        unknown_operators: Operators that neither ONNX nor ONNX Runtime defines.
        saturating: Layers that need a session option on x86 without VNNI.
    """

    path: Path
    size_bytes: int
    producer: str
    opset: int
    ir_version: int
    manifest: Manifest | None
    layers: tuple[LayerSummary, ...]
    activations: tuple[ActivationSummary, ...]
    float_layers: tuple[str, ...]
    least_onnxruntime: str
    unknown_operators: tuple[str, ...]
    saturating: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinite numbers: they become None."""
        plain = asdict(self)
        plain["path"] = str(self.path)
        plain["manifest"] = None if self.manifest is None else self.manifest.model_dump(mode="json")
        return {key: _without_infinite(value) for key, value in plain.items()}


def summarize_onnx(path: Path) -> OnnxSummary:
    """Read the quantization of an ONNX file.

    Raises:
        InputError: The file is missing or is no ONNX file, or its manifest is damaged.
    """
    model = load_onnx(path)
    manifest = read_manifest(model)
    weight_bits = manifest.weight_bits if manifest else {}
    act_bits = manifest.act_bits if manifest else {}
    weights = [t for t in weight_tensors(model) if t.kind == "weight"]
    return OnnxSummary(
        path=path,
        size_bytes=path.stat().st_size,
        producer=f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        opset=next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        ir_version=model.ir_version,
        manifest=manifest,
        layers=tuple(_layer(t, weight_bits) for t in weights),
        activations=tuple(_activation(t, act_bits) for t in code_tensors(model)),
        float_layers=tuple(_float_layers(model)),
        least_onnxruntime=least_release(model),
        unknown_operators=tuple(_unknown_operators(model)),
        saturating=tuple(saturating_layers(model)),
    )


def require_file(path: Path) -> None:
    """Refuse what would be waited for, such as a pipe.

    Raises:
        InputError: The path exists and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file", hint="give an .onnx file")


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read a model file.

    Raises:
        InputError: It is missing or is no ONNX file, or the file that holds its weights is missing.
    """
    require_file(path)
    try:
        model = onnx.load(path, load_external_data=False)
        require_external_data(model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="give an .onnx file") from None
    except Exception as error:  # protobuf's decode error has no stable public class
        raise InputError(f"{path} is not a readable ONNX file", hint="give an .onnx file") from error
    if not model.graph.node:
        raise InputError(f"{path} is not a readable ONNX file", hint="give an .onnx file")
    return model


def _layer(tensor: WeightTensor, bits: Mapping[str, int]) -> LayerSummary:
    return LayerSummary(
        name=tensor.name,
        op=tensor.op,
        bits=bits.get(tensor.name, tensor.bits),
        stored=_type_name(tensor.onnx_type),
        symmetric=tensor.symmetric,
        shape=tensor.shape,
        channels=tensor.scales.size,
        least_scale=float(tensor.scales.min(initial=float("inf"))),
        greatest_scale=float(tensor.scales.max(initial=0.0)),
        bias=tensor.bias,
    )


def _activation(tensor: CodeTensor, bits: Mapping[str, int]) -> ActivationSummary:
    return ActivationSummary(
        name=tensor.name,
        bits=bits.get(tensor.name, tensor.bits),
        stored=_type_name(tensor.onnx_type),
        low=tensor.low,
        high=tensor.high,
        zero_point=tensor.zero_point[0],
        scale=tensor.scale[0],
        integer=tensor.exact,
    )


def _float_layers(model: onnx.ModelProto) -> list[str]:
    floats = {i.name for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    return [
        node.name or node.output[0]
        for node in model.graph.node
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in floats
    ]


def _unknown_operators(model: onnx.ModelProto) -> list[str]:
    own = {(f.domain, f.name) for f in model.functions}
    bodies = [model.graph.node, *(f.node for f in model.functions)]
    found = {
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for body in bodies
        for node in _with_inner(body)
        if (node.domain, node.op_type) not in own
        and node.domain not in _RUNTIME_DOMAINS
        and not (node.domain == "" and node.op_type in _RUNTIME_OPERATORS)
        and not onnx.defs.has(node.op_type, "" if node.domain == "ai.onnx" else node.domain)
    }
    return sorted(found)


def _with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of the graphs in their attributes (If, Loop, Scan)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _with_inner(graph.node)


def _without_infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _type_name(onnx_type: int) -> str:
    return str(onnx.TensorProto.DataType.Name(onnx_type)).lower()
