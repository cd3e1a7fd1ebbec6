"""Read the quantizers of a QDQ graph, whichever tool wrote it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

CODES, SCALE = ".codes", ".scale"
_RANGES = {
    onnx.TensorProto.UINT8: (0, 255),
    onnx.TensorProto.INT8: (-128, 127),
    onnx.TensorProto.UINT16: (0, 65535),
    onnx.TensorProto.INT16: (-32768, 32767),
    onnx.TensorProto.UINT4: (0, 15),
    onnx.TensorProto.INT4: (-8, 7),
    onnx.TensorProto.UINT2: (0, 3),
    onnx.TensorProto.INT2: (-2, 1),
}
_PASSES_ON = {"Cast", "Sub", "Identity", "Reshape", "Transpose"}


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
    """

    name: str
    tensor: str
    onnx_type: int
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: int
    high: int

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
        op: Operator that reads it.
        onnx_type: Element type it is stored in.
        shape: Shape of the codes.
        scales: All step sizes.
        bits: Bits that hold its codes of every channel.
        symmetric: Whether all zero points are 0.
    """

    name: str
    kind: str
    op: str
    onnx_type: int
    shape: tuple[int, ...]
    scales: np.ndarray
    bits: int
    symmetric: bool


class GraphView:
    """Look-ups in a graph: constants, producers and consumers by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {i.name: i for i in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    def constant(self, name: str) -> np.ndarray:
        """The data of a constant tensor."""
        return numpy_helper.to_array(self.constants[name])

    def optional(self, node: onnx.NodeProto, position: int) -> str | None:
        """Name of an optional input, None where it is left out."""
        return node.input[position] or None if position < len(node.input) else None


def code_tensors(model: onnx.ModelProto) -> tuple[CodeTensor, ...]:
    """The activation quantizers of a model in graph order."""
    view = GraphView(model)
    return tuple(_code_tensors(view))


def _code_tensors(view: GraphView) -> Iterator[CodeTensor]:
    for node in view.graph.node:
        if (
            node.op_type != "QuantizeLinear"
            or node.input[0] in view.constants
            or node.input[1] not in view.constants
        ):
            continue
        scale = view.constant(node.input[1])
        zero_point, onnx_type = _zero_point(view, node, scale)
        low, high = _RANGES.get(onnx_type, (0, 255))
        tensor = node.output[0]
        users = view.consumers[tensor]
        if len(users) == 1 and users[0].op_type == "Clip":
            bounds = [view.optional(users[0], i) for i in (1, 2)]
            low = max(low, int(view.constant(bounds[0]))) if bounds[0] in view.constants else low
            high = min(high, int(view.constant(bounds[1]))) if bounds[1] in view.constants else high
            tensor = users[0].output[0]
        name = tensor.removesuffix(CODES) if tensor.endswith(CODES) else node.input[1].removesuffix(SCALE)
        scales = tuple(float(s) for s in scale.reshape(-1))
        yield CodeTensor(name, tensor, onnx_type, scales, zero_point, low, high)


def _zero_point(view: GraphView, node: onnx.NodeProto, scale: np.ndarray) -> tuple[tuple[int, ...], int]:
    name = view.optional(node, 2)
    if name is None or name not in view.constants:
        declared = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
        return (0,) * scale.size, declared or onnx.TensorProto.UINT8
    values = view.constant(name).astype(np.int64).reshape(-1)
    return tuple(int(v) for v in values), view.constants[name].data_type
