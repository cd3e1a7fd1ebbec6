"""Read the quantizers of a QDQ graph, whichever tool wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from metaaug_cli.errors import InputError

CODES, SCALE = ".codes", ".scale"
RANGES: dict[int, tuple[int, int]] = {
    onnx.TensorProto.UINT8: (0, 255),
    onnx.TensorProto.INT8: (-128, 127),
    onnx.TensorProto.UINT16: (0, 65535),
    onnx.TensorProto.INT16: (-32768, 32767),
    onnx.TensorProto.UINT4: (0, 15),
    onnx.TensorProto.INT4: (-8, 7),
    onnx.TensorProto.UINT2: (0, 3),
    onnx.TensorProto.INT2: (-2, 1),
}
MOVEMENT = {
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Flatten",
    "Split",
    "Gather",
    "Expand",
    "MaxPool",
}
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_PLAIN_CONSTANTS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}
_UNPACKING = {"Cast", "Sub"}
_BOUNDS = {"Clip": (1, 2), "Max": (1, 9), "Min": (9, 1)}  # inputs with the lower and upper bound; 9 is none
_INTEGER_KERNELS = {
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Mul",
    "GlobalAveragePool",
    "AveragePool",
    "Concat",
    "Sigmoid",
    "LeakyRelu",
}


@dataclass(frozen=True)
class CodeTensor:
    """The codes of one activation quantizer.

    Args:
        name: Name of the quantizer.
        tensor: Name of the tensor that holds the codes, after any Clip.
        onnx_type: Element type of that tensor.
        scale: Step size; several for a per-channel quantizer.
        zero_point: Codes of the value 0, as many as scales.
        low: Least code that can occur.
        high: Greatest code that can occur.
        exact: Whether the codes come from an integer kernel (or straight from the input), so that two correct
            runtimes must agree on every one of them. Behind a float operator the last bit decides ties.
    """

    name: str
    tensor: str
    onnx_type: int
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: int
    high: int
    exact: bool

    @property
    def bits(self) -> int:
        """Bits that hold all its codes: 4 for 0 to 15, and for 0 to 12 as an absorbed ReLU6 leaves them."""
        return max(1, (self.high - self.low).bit_length())


@dataclass(frozen=True)
class WeightTensor:
    """The codes of one weight or bias.

    Args:
        name: Name of the layer.
        kind: "weight" or "bias".
        op: Operator that reads it, "" for none.
        bias: What that operator adds: "int32" codes, "float" values, or None.
        onnx_type: Element type it is stored in.
        shape: Shape of the codes.
        scales: All step sizes.
        bits: Bits that hold every channel's codes and zero point.
        symmetric: Whether all zero points are 0.
    """

    name: str
    kind: str
    op: str
    bias: str | None
    onnx_type: int
    shape: tuple[int, ...]
    scales: np.ndarray
    bits: int
    symmetric: bool


class GraphView:
    """Look-ups in a graph: constants, producers and consumers by tensor name.

    An Identity of a constant is a constant.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {i.name: i for i in model.graph.initializer}
        for node in model.graph.node:
            value = _constant_value(node) if node.op_type == "Constant" else None
            if node.op_type == "Identity":
                value = self.constants.get(node.input[0])
            if value is not None:
                self.constants[node.output[0]] = value
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    def constant(self, name: str) -> np.ndarray:
        """The data of a constant tensor.

        Raises:
            InputError: Its bytes do not fit its shape, or are not there.
        """
        try:
            return numpy_helper.to_array(self.constants[name])
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"the file's constant {name} is damaged: {error}") from None

    def optional(self, node: onnx.NodeProto, position: int) -> str | None:
        """Name of an optional input, None where it is left out."""
        return node.input[position] or None if position < len(node.input) else None

    def has_known_grid(self, node: onnx.NodeProto) -> bool:
        """Whether scale and zero point of a QuantizeLinear or DequantizeLinear are constants with values."""
        names = (node.input[1], self.optional(node, 2))
        return all(n is None or (n in self.constants and 0 not in self.constants[n].dims) for n in names)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant node gives, None for text and sparse tensors."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in _PLAIN_CONSTANTS:
            value = np.asarray(helper.get_attribute_value(attribute), _PLAIN_CONSTANTS[attribute.name])
            return numpy_helper.from_array(value, node.output[0])
    return None


def code_tensors(model: onnx.ModelProto) -> tuple[CodeTensor, ...]:
    """The activation quantizers of a model in graph order.

    Left out are those whose grid the file does not tell.
    """
    view = GraphView(model)
    return tuple(_code_tensors(view))


def _code_tensors(view: GraphView) -> Iterator[CodeTensor]:
    for node in view.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in view.constants:
            continue
        if not view.has_known_grid(node):
            continue
        zero_point, onnx_type = _zero_point(view, node)
        low, high = activation_range(view, node)
        clip = _clip_of_codes(view, node)
        tensor = node.output[0] if clip is None else clip.output[0]
        yield CodeTensor(
            name=tensor.removesuffix(CODES) if tensor.endswith(CODES) else node.input[1].removesuffix(SCALE),
            tensor=tensor,
            onnx_type=onnx_type,
            scale=tuple(float(s) for s in view.constant(node.input[1]).reshape(-1)),
            zero_point=zero_point,
            low=low,
            high=high,
            exact=_is_exact(view, node.input[0]),
        )


def activation_range(view: GraphView, quantize: onnx.NodeProto) -> tuple[int, int]:
    """Least and greatest code that a QuantizeLinear, with a Clip before or after it, can give.

    Its grid has to be known.
    """
    zero_point, onnx_type = _zero_point(view, quantize)
    low, high = RANGES.get(onnx_type, (0, 255))
    clip = _clip_of_codes(view, quantize)
    if clip is not None:
        bounds = _bounds(view, clip, low, high)
        return max(low, int(bounds[0])), min(high, int(bounds[1]))
    before = view.producer.get(quantize.input[0])
    scale = view.constant(quantize.input[1])
    step, zero = float(scale.reshape(-1)[0]), zero_point[0]
    is_single = scale.size == 1 and np.isfinite(step) and step > 0
    while is_single and before is not None and before.op_type in _BOUNDS:
        bounds = _bounds(view, before, (low - zero) * step, (high - zero) * step)
        low, high = (_nearest(bound / step, low - zero, high - zero) + zero for bound in bounds)
        before = view.producer.get(before.input[0])
    return low, high


def _nearest(value: float, low: int, high: int) -> int:
    """The integer from ``low`` to ``high`` nearest to ``value``, which may be infinite."""
    return round(min(high, max(low, value)))


def _clip_of_codes(view: GraphView, quantize: onnx.NodeProto) -> onnx.NodeProto | None:
    users = view.consumers[quantize.output[0]]
    return users[0] if len(users) == 1 and users[0].op_type == "Clip" else None


def _bounds(view: GraphView, node: onnx.NodeProto, low: float, high: float) -> tuple[float, float]:
    """Constant bounds that a Clip, Max or Min sets, with defaults for those it does not."""
    names = [view.optional(node, i) for i in _BOUNDS[node.op_type]]
    known = [view.constant(n).reshape(-1) if n is not None and n in view.constants else None for n in names]
    lower, upper = (float(k[0]) if k is not None and k.size == 1 else None for k in known)
    return low if lower is None else lower, high if upper is None else upper


def _is_exact(view: GraphView, name: str) -> bool:
    node = view.producer.get(name)
    while node is not None and node.op_type in MOVEMENT | {"Relu", *_BOUNDS}:
        name = node.input[0]
        node = view.producer.get(name)
    if node is None or node.op_type == "DequantizeLinear":
        return True
    return node.op_type in _INTEGER_KERNELS and all(_is_dequantized(view, i) for i in node.input if i)


def _is_dequantized(view: GraphView, name: str) -> bool:
    node = view.producer.get(name)
    while node is not None and node.op_type in MOVEMENT:
        node = view.producer.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _zero_point(view: GraphView, quantize: onnx.NodeProto) -> tuple[tuple[int, ...], int]:
    name = view.optional(quantize, 2)
    if name is None:
        declared = next((a.i for a in quantize.attribute if a.name == "output_dtype"), 0)
        return (0,) * view.constant(quantize.input[1]).size, declared or onnx.TensorProto.UINT8
    values = view.constant(name).astype(np.int64).reshape(-1)
    return tuple(int(v) for v in values), view.constants[name].data_type


def weight_tensors(model: onnx.ModelProto) -> tuple[WeightTensor, ...]:
    """The quantized weights and biases of a model in graph order.

    Left out are single numbers, and those whose grid the file does not tell.
    """
    view = GraphView(model)
    found = (
        _weight_tensor(view, node)
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and view.has_known_grid(node)
    )
    return tuple(weight for weight in found if weight is not None)


def _stored(view: GraphView, name: str) -> tuple[onnx.TensorProto, np.ndarray] | None:
    """The constant that holds codes, and the codes as int64 after the Cast and Sub of packed ones."""
    subtracted = np.zeros((), np.int64)
    node = view.producer.get(name)
    while node is not None and node.op_type in _UNPACKING:
        if node.op_type == "Sub" and node.input[1] not in view.constants:
            return None
        if node.op_type == "Sub":
            subtracted = subtracted + view.constant(node.input[1]).astype(np.int64)
        name = node.input[0]
        node = view.producer.get(name)
    if name not in view.constants:
        return None
    return view.constants[name], view.constant(name).astype(np.int64) - subtracted


def _weight_tensor(view: GraphView, node: onnx.NodeProto) -> WeightTensor | None:
    stored = _stored(view, node.input[0])
    if stored is None or stored[1].ndim == 0:
        return None
    constant, codes = stored
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    scales = view.constant(node.input[1]).reshape(-1)
    name = view.optional(node, 2)
    zero_points = np.zeros(1, np.int64) if name is None else view.constant(name).astype(np.int64)
    reader = next(iter(view.consumers[node.output[0]]), None)
    is_bias = constant.data_type == onnx.TensorProto.INT32
    layer = reader.name if reader is not None and reader.name else node.input[0]
    return WeightTensor(
        name=node.input[0].removesuffix(CODES) if node.input[0].endswith(CODES) else layer,
        kind="bias" if is_bias else "weight",
        op=reader.op_type if reader is not None else "",
        bias=_bias_kind(view, reader),
        onnx_type=constant.data_type,
        shape=tuple(codes.shape),
        scales=scales,
        bits=32 if is_bias else _bits(codes, np.resize(zero_points, scales.size), axis),
        symmetric=not zero_points.any(),
    )


def _bits(codes: np.ndarray, zero_points: np.ndarray, axis: int) -> int:
    """Bits that hold the codes and the zero point of every channel along ``axis``, or of all in one."""
    has_axis = -codes.ndim <= axis < codes.ndim
    per_channel = has_axis and zero_points.size == codes.shape[axis]
    rows = np.moveaxis(codes, axis, 0).reshape(zero_points.size, -1) if per_channel else codes.reshape(1, -1)
    held = np.concatenate([rows, zero_points.reshape(len(rows), -1)], axis=1)
    return max(1, int((held.max(1) - held.min(1)).max()).bit_length())


def _bias_kind(view: GraphView, layer: onnx.NodeProto | None) -> str | None:
    name = None if layer is None or layer.op_type not in WEIGHTED else view.optional(layer, 2)
    if name is None:
        return None
    producer = view.producer.get(name)
    return "int32" if producer is not None and producer.op_type == "DequantizeLinear" else "float"
