"""Let operators that only move values work on codes instead of dequantized floats.

ONNX Runtime does this by itself for reshapes, transposes, slices and max pools. It does not for the
operators below, whose float results would keep the layers around them in float.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from metaaug_cli.deployment.onnx_passes import add_initializer, constant_array

_HANDLED_BY_RUNTIME = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "MaxPool"}
_MOVED_HERE = {"Concat", "Split", "Resize", "DepthToSpace", "SpaceToDepth", "Pad", "Gather", "Expand", "Tile"}


@dataclass(frozen=True)
class _Codes:
    """Codes of a tensor with the per-tensor scale and zero point that dequantize them."""

    value: ir.Value
    scale: ir.Value
    zero_point: ir.Value

    def same_grid(self, other: _Codes) -> bool:
        return np.array_equal(constant_array(self.scale), constant_array(other.scale)) and np.array_equal(
            constant_array(self.zero_point), constant_array(other.zero_point)
        )


def move_codes(model: ir.Model) -> int:
    """Rewrite ``dequantize, move`` as ``move, dequantize`` where that is exact; returns how many were."""
    known: dict[ir.Value, _Codes] = {}
    moved = 0
    for node in list(model.graph):
        if node.op_type not in _MOVED_HERE or not _keeps_values(node) or _left_to_runtime(node):
            continue
        sources = [_codes_behind(model.graph, value, known) for value in _data_inputs(node)]
        first = sources[0] if sources else None
        if first is None or any(s is None or not s.same_grid(first) for s in sources):
            continue
        if any(output in model.graph.outputs for output in node.outputs):
            continue
        copy = _on_codes(model.graph, node, [s.value for s in sources if s is not None], first)
        _dequantize_outputs(model.graph, node, copy, first)
        moved += 1
    return moved


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return [value for value in inputs if value is not None]


def _keeps_values(node: ir.Node) -> bool:
    """Whether every output element is an input element (or a padded zero)."""
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        return value is None or (value.const_value is not None and not np.any(constant_array(value)))
    return True


def _left_to_runtime(node: ir.Node) -> bool:
    """A concatenation that is quantized again has an integer kernel of its own."""
    users = [user.op_type for output in node.outputs for user in output.consumers()]
    return node.op_type == "Concat" and users == ["QuantizeLinear"]


def _codes_behind(graph: ir.Graph, value: ir.Value, known: dict[ir.Value, _Codes]) -> _Codes | None:
    """The codes whose dequantized values a tensor holds, through reshapes and slices, or None."""
    node = value.producer()
    if value in known or node is None:
        return known.get(value)
    if node.op_type == "DequantizeLinear":
        codes, scale, zero_point = (*node.inputs, None)[:3]
        if codes is None or scale is None or zero_point is None or codes.const_value is not None:
            return None
        is_scalar = scale.const_value is not None and constant_array(scale).ndim == 0
        return _Codes(codes, scale, zero_point) if is_scalar else None
    if node.op_type in _HANDLED_BY_RUNTIME and node.inputs[0] is not None:
        source = _codes_behind(graph, node.inputs[0], known)
        if source is not None:
            copy = _on_codes(graph, node, [source.value], source)
            known[value] = _Codes(copy.outputs[0], source.scale, source.zero_point)
    return known.get(value)


def _on_codes(graph: ir.Graph, node: ir.Node, codes: list[ir.Value], grid: _Codes) -> ir.Node:
    """A copy of a node that reads codes."""
    inputs = [*codes, *node.inputs[len(codes) :]]
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        zero = add_initializer(graph, f"{node.outputs[0].name}_padding", constant_array(grid.zero_point))
        inputs = [*inputs[:2], zero, *inputs[3:]]
    attributes = list(node.attributes.values())
    copy = ir.Node("", node.op_type, inputs, attributes, num_outputs=len(node.outputs))
    for new, old in zip(copy.outputs, node.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}_codes", old.shape, ir.TensorType(ir.DataType.UINT8)
    graph.insert_after(node, copy)
    return copy


def _dequantize_outputs(graph: ir.Graph, node: ir.Node, copy: ir.Node, grid: _Codes) -> None:
    for old, codes in zip(node.outputs, copy.outputs, strict=True):
        dequantize = ir.Node("", "DequantizeLinear", [codes, grid.scale, grid.zero_point])
        new = dequantize.outputs[0]
        new.name, new.shape, new.type = f"{old.name}_values", old.shape, old.type
        old.replace_all_uses_with(new)
        graph.insert_after(copy, dequantize)
