"""A small integer executor of exported QDQ graphs: what the file means, computed exactly.

It shares no code with the simulation or with ONNX Runtime. Convolutions and matrix products sum integer
codes exactly; the way back to 8 bits is the float32 arithmetic of ONNX Runtime's integer kernels, written
down per operator. Operators without an integer kernel run in float32.

An operator's result waits (``Pending``) for the quantizer that follows it, because integer kernels turn
sums into codes in one step instead of passing through a float tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from metaaug_cli.deployment.onnx_view import RANGES, GraphView, code_tensors
from metaaug_cli.verification import reference_float as float_ops
from metaaug_cli.verification import reference_ops as ops
from metaaug_cli.verification.reference_ops import Array, Pending, Quantized, Value, as_float

_INTEGER_OPS: dict[str, Callable[[onnx.NodeProto, list[Any]], Pending | None]] = {
    "Conv": ops.convolution,
    "Gemm": ops.gemm,
    "MatMul": ops.matmul,
    "Add": ops.add,
    "Mul": ops.multiply,
    "GlobalAveragePool": ops.global_average_pool,
    "AveragePool": ops.average_pool,
    "Relu": ops.relu,
}
_MOVES_CODES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "MaxPool"}
_OWN_OPS = {
    "ConvTranspose": float_ops.transposed_convolution,
    "Pad": float_ops.constant_pad,
    "Resize": float_ops.nearest_resize,
}


class IntegerExecutor:
    """Runs a model on images and keeps the codes of every activation quantizer.

    Args:
        model: A QDQ model with one input.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._view = GraphView(model)
        self._code_names = {t.tensor: t.name for t in code_tensors(model)}
        self._opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self._constants: dict[str, Value] = {n: self._view.constant(n) for n in self._view.constants}
        self._last_use = _last_uses(model.graph)
        self._float_ops: dict[str, Any] = {}

    def run(
        self, images: Array, *, forced: Mapping[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Logits, and codes by quantizer name, of a batch of images (N, C, H, W).

        Args:
            images: Normalised float32 images.
            forced: Codes by quantizer name that replace the computed ones for the layers that follow; the
                computed ones are still returned.
        """
        graph = self._view.graph
        values: dict[str, Value] = {graph.input[0].name: images.astype(np.float32)}
        codes: dict[str, Array] = {}
        for position, node in enumerate(graph.node):
            if node.op_type == "Constant":
                continue
            results = self._evaluate(node, [self._read(values, name) for name in node.input])
            for name, result in zip(node.output, results, strict=True):
                values[name] = result
                if name in self._code_names:
                    label = self._code_names[name]
                    codes[label] = result
                    if forced is not None and label in forced:
                        values[name] = forced[label]
            for name in self._last_use.get(position, ()):
                values.pop(name, None)
        return as_float(values[graph.output[0].name]), codes

    def _read(self, values: Mapping[str, Value], name: str) -> Value | None:
        if not name:
            return None
        return values[name] if name in values else self._constants[name]

    def _evaluate(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        if node.op_type == "QuantizeLinear":
            return [self._quantize(node, inputs)]
        if node.op_type == "DequantizeLinear":
            return [_dequantize(node, inputs)]
        if node.op_type in _INTEGER_OPS:
            pending = _INTEGER_OPS[node.op_type](node, inputs)
            if pending is not None:
                return [pending]
        if node.op_type in _MOVES_CODES and isinstance(inputs[0], Quantized) and inputs[0].per_tensor:
            source: Quantized = inputs[0]
            (moved,) = self._plain(node, [source.codes, *inputs[1:]])
            return [Quantized(moved, source.scale, source.zero_point, source.axis)]
        return self._plain(node, [i if i is None else as_float(i) for i in inputs])

    def _quantize(self, node: onnx.NodeProto, inputs: list[Any]) -> Array:
        value, scale = inputs[0], np.asarray(inputs[1], np.float32)
        zero_point = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros((), np.uint8)
        onnx_type = onnx.helper.np_dtype_to_tensor_dtype(zero_point.dtype)
        low, high = RANGES[onnx_type]
        if isinstance(value, Pending) and scale.size == 1:
            rounded = value.to_codes(np.float32(scale.reshape(())), int(zero_point.reshape(())))
        else:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            data = as_float(value)
            shape = ops.along(axis, data.ndim, scale.size)
            rounded = np.rint(data / scale.reshape(shape)) + zero_point.astype(np.float32).reshape(shape)
        return np.clip(rounded, low, high).astype(zero_point.dtype)

    def _plain(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        """An operator as ONNX defines it, on whole tensors of codes or floats."""
        if node.op_type == "MaxPool":
            return [ops.max_pool(node, inputs[0])]
        if node.op_type == "Conv":
            return [ops.float_convolution(node, inputs)]
        if node.op_type == "GroupNormalization":
            return [float_ops.group_normalization(node, inputs)]
        special = _OWN_OPS.get(node.op_type)
        if special is not None and (found := special(node, inputs)) is not None:
            return [found]
        if node.op_type in ("Clip", "Cast", "Sub") and inputs[0].dtype != np.float32:
            return [ops.integer_elementwise(node, inputs)]
        key = node.output[0]
        if key not in self._float_ops:
            self._float_ops[key] = _single_node_evaluator(node, self._opset)
        feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
        return list(self._float_ops[key].run(None, feeds))


def _dequantize(node: onnx.NodeProto, inputs: list[Any]) -> Quantized:
    codes, scale = inputs[0], np.asarray(inputs[1], np.float32)
    zero_point = (
        inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros(scale.shape, codes.dtype)
    )
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    return Quantized(codes, scale, zero_point.astype(np.int64), axis)


def _single_node_evaluator(node: onnx.NodeProto, opset: int) -> Any:
    from onnx import reference

    graph = onnx.helper.make_graph(
        [node],
        "one_node",
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in dict.fromkeys(node.input) if name],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in node.output],
    )
    return reference.ReferenceEvaluator(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    )


def _last_uses(graph: onnx.GraphProto) -> dict[int, list[str]]:
    """Tensors that may be forgotten after each node."""
    last: dict[str, int] = {}
    for position, node in enumerate(graph.node):
        for name in (*node.input, *node.output):
            last[name] = position
    kept = {output.name for output in graph.output}
    uses: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in kept:
            uses.setdefault(position, []).append(name)
    return uses
