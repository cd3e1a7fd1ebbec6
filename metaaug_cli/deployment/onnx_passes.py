"""Passes over the exported graph that give it the form ONNX Runtime runs as integers.

Each pass changes the model in place and keeps its function bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

CODES, SCALE = ".codes", ".scale"


def simplify(model: ir.Model) -> None:
    """Inline functions, fold shape arithmetic and drop what is unused.

    The exporter's own optimisation would also merge initializers of equal value, so that two quantizers
    whose scales happen to agree would lose their names; hence these single steps.
    """
    common.InlinePass()(model)
    optimizer.fold_constants_ir(model)
    rewriter.rewrite(model)
    optimizer.fold_constants_ir(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ClearMetadataAndDocStringPass()(model)


def quantizer_nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node | None, ir.Node]]:
    """(QuantizeLinear, Clip on its codes or None, DequantizeLinear) of every activation quantizer."""
    for node in list(graph):
        if node.op_type != "QuantizeLinear":
            continue
        users = node.outputs[0].consumers()
        clip = users[0] if len(users) == 1 and users[0].op_type == "Clip" else None
        for user in clip.outputs[0].consumers() if clip is not None else users:
            if user.op_type == "DequantizeLinear":
                yield node, clip, user
                break


def add_weight_zero_points(model: ir.Model) -> None:
    """Write out the zero points (all 0) of weight codes: without them a Gemm stays in float."""
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if (
            codes is None
            or codes.const_value is None
            or (len(node.inputs) > 2 and node.inputs[2] is not None)
        ):
            continue
        if codes.dtype is None or codes.dtype == ir.DataType.INT32:
            continue
        shape = constant_array(node.inputs[1]).shape
        name = base_name(codes, CODES) + ".zero_point"
        zero_point = model.graph.initializers.get(name) or add_initializer(
            model.graph, name, np.zeros(shape, codes.dtype.numpy())
        )
        node.resize_inputs(3)
        node.replace_input_with(2, zero_point)


def name_tensors(model: ir.Model) -> None:
    """Name codes, constants and nodes after the quantizer or layer they belong to.

    The codes of activation quantizer ``NAME`` (whose scale is ``NAME.scale``) become ``NAME.codes``, its
    dequantized values ``NAME.values``. A quantizer used at several places gets ``NAME.2`` and so on.
    """
    taken = set(model.graph.initializers)
    for quantize, clip, dequantize in list(quantizer_nodes(model.graph)):
        scale = quantize.inputs[1]
        if scale is None or scale.name is None or not scale.name.endswith(SCALE):
            continue
        name = _unused(scale.name.removesuffix(SCALE), taken)
        _name_quantizer(model.graph, name, quantize, clip, dequantize)
    for node in model.graph:
        node.name = _node_name(node)


def _unused(name: str, taken: set[str]) -> str:
    candidates = (name if i == 1 else f"{name}.{i}" for i in range(1, len(taken) + 2))
    chosen = next(c for c in candidates if c + CODES not in taken)
    taken.add(chosen + CODES)
    return chosen


def _name_quantizer(
    graph: ir.Graph, name: str, quantize: ir.Node, clip: ir.Node | None, dequantize: ir.Node
) -> None:
    is_output = dequantize.outputs[0] in graph.outputs
    (clip or quantize).outputs[0].name = name + CODES
    if clip is not None:
        quantize.outputs[0].name = name + ".unclipped_codes"
        for index, bound in ((1, "quant_min"), (2, "quant_max")):
            _own_constant(graph, clip, index, f"{name}.{bound}")
    _own_constant(graph, quantize, 2, f"{name}.zero_point")
    for user in (clip or quantize).outputs[0].consumers():
        if user.op_type == "DequantizeLinear":
            user.replace_input_with(2, quantize.inputs[2])
    if not is_output:
        dequantize.outputs[0].name = name + ".values"


def _own_constant(graph: ir.Graph, node: ir.Node, index: int, name: str) -> None:
    """Give a node a constant of its own name in place of a numbered or shared one."""
    old = node.inputs[index]
    if old is None or old.const_value is None or old.name == name:
        return
    new = graph.initializers.get(name) or add_initializer(graph, name, old.const_value.numpy())
    node.replace_input_with(index, new)
    drop_if_unused(graph, old)


def _node_name(node: ir.Node) -> str:
    if len(node.inputs) > 1 and node.op_type in ("Conv", "Gemm", "ConvTranspose"):
        dequantize = node.inputs[1].producer() if node.inputs[1] is not None else None
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            return base_name(dequantize.inputs[0], CODES)
    return f"{node.outputs[0].name}/{node.op_type}"


def fold_zero_padding(model: ir.Model) -> int:
    """Move constant-zero Pad nodes into the pads of the convolutions that follow; returns how many.

    A convolution pads with the value 0, whatever the zero point, so both forms compute the same; with a
    separate Pad ONNX Runtime keeps the convolution in float.
    """
    folded = 0
    for pad in [n for n in model.graph if n.op_type == "Pad"]:
        sides = _spatial_padding(pad)
        if sides is None:
            continue
        for conv in list(pad.outputs[0].consumers()):
            if conv.op_type == "Conv" and conv.inputs[0] is pad.outputs[0] and _has_numeric_pads(conv):
                rank = len(sides)
                old = conv.attributes.get_ints("pads", [0] * rank)
                conv.attributes["pads"] = ir.AttrInt64s(
                    "pads", [a + b for a, b in zip(old, sides, strict=True)]
                )
                conv.attributes.pop("auto_pad", None)
                conv.replace_input_with(0, pad.inputs[0])
                folded += 1
        if not pad.outputs[0].consumers() and pad.outputs[0] not in model.graph.outputs:
            model.graph.remove(pad, safe=True)
    return folded


def _spatial_padding(pad: ir.Node) -> list[int] | None:
    """Begin and end padding of the spatial axes, or None where it is not plain zero padding of them."""
    if pad.attributes.get_string("mode", "constant") != "constant":
        return None
    constants = [v for v in pad.inputs[1:] if v is not None]
    if any(v.const_value is None for v in constants) or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None and np.any(constant_array(pad.inputs[2]) != 0):
        return None
    pads = [int(p) for p in constant_array(pad.inputs[1])]
    rank = len(pads) // 2
    begin, end = pads[:rank], pads[rank:]
    if any(begin[:2]) or any(end[:2]) or min(pads) < 0:
        return None
    return begin[2:] + end[2:]


def _has_numeric_pads(conv: ir.Node) -> bool:
    return conv.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def remove_unused(model: ir.Model) -> None:
    """Drop nodes whose results nobody reads and initializers nobody uses."""
    common.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.initializers.values()):
        drop_if_unused(model.graph, value)


def drop_if_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove an initializer that no node reads."""
    if value.name is None or value.name not in graph.initializers:
        return
    if not value.uses() and value not in graph.outputs:
        del graph.initializers[value.name]


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register a constant under a name and return its value."""
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def constant_array(value: ir.Value | None) -> np.ndarray:
    """The data of a constant input."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def base_name(value: ir.Value | None, suffix: str) -> str:
    """A tensor's name without its suffix."""
    assert value is not None
    assert value.name is not None
    return value.name.removesuffix(suffix)
