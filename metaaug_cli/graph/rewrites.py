"""Operators written as the plainer ones they amount to, which have gradients, integer forms and one result.

A program that was decomposed before it was saved gets its convolutions and linear layers back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from metaaug_cli.graph.graph_tools import insert_call, option

aten = torch.ops.aten

_Call = tuple[Callable[..., Any], tuple[Any, ...]]

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}
_TRANSPOSES = {aten.permute.default: ([1, 0],), aten.t.default: (), aten.transpose.int: (0, 1)}
# By operator and number of the result: what gives that result alone.
_SINGLE_RESULTS: dict[tuple[Any, Any], Callable[..., Any]] = {
    (aten.max.dim, 0): aten.amax.default,
    (aten.min.dim, 0): aten.amin.default,
    (aten.max.dim, 1): aten.argmax.default,
    (aten.min.dim, 1): aten.argmin.default,
    (aten.max_pool2d_with_indices.default, 0): aten.max_pool2d.default,
    (aten.native_layer_norm.default, 0): aten.layer_norm.default,
    (aten.native_group_norm.default, 0): aten.group_norm.default,
}


def rewrite(module: fx.GraphModule) -> None:
    """Replace what can be said more plainly, in place; every node must have its ``owner``."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        new = _plainer(node)
        if new is None:
            continue
        before = node.all_input_nodes
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        for source in before:
            if source.op == "call_function" and not source.users:
                module.graph.erase_node(source)


def _plainer(node: fx.Node) -> fx.Node | None:
    if node.target is aten.copy.default:
        return _copied(node)
    call = _plainer_call(node)
    return None if call is None else insert_call(node, *call)


def _plainer_call(node: fx.Node) -> _Call | None:
    target = node.target
    if target is operator.getitem:
        return _single_result(node)
    if target is aten.convolution.default:
        return _convolution(node)
    if target is aten.mm.default:
        return _linear(node.args[0], node.args[1], None)
    if target is aten.addmm.default and not node.kwargs and _rank(node.args[0]) == 1:
        return _linear(node.args[1], node.args[2], node.args[0])
    if target is aten.add.Tensor and "alpha" in node.kwargs:
        return _weighted_sum(node)
    if target is aten.rrelu.default and not option(node, "training"):
        mean_slope = (option(node, "lower") + option(node, "upper")) / 2
        return aten.leaky_relu.default, (node.args[0], mean_slope)
    return None


def _weighted_sum(node: fx.Node) -> _Call:
    x, y = node.args
    factor: Any = node.kwargs["alpha"]
    scaled = insert_call(node, aten.mul.Tensor, (y, factor)) if isinstance(y, fx.Node) else y * factor
    return aten.add.Tensor, (x, scaled)


def _copied(node: fx.Node) -> fx.Node:
    """What a write into a slice writes: the source, in the type and shape of what it overwrites."""
    place, source = node.args[:2]
    assert isinstance(place, fx.Node)
    assert isinstance(source, fx.Node)
    old, new = place.meta["val"], source.meta["val"]
    if new.dtype != old.dtype:
        source = insert_call(node, aten.to.dtype, (source, old.dtype))
    if tuple(map(str, new.shape)) != tuple(map(str, old.shape)):
        source = insert_call(node, aten.expand.default, (source, _expansion(node, new.shape, old.shape)))
    return source


def _expansion(node: fx.Node, small: Sequence[Any], large: Sequence[Any]) -> list[Any]:
    """What ``expand`` takes to bring one shape to another: -1 keeps a batch size that is there already."""
    missing = len(large) - len(small)
    image = next(n for n in node.graph.nodes if n.op == "placeholder")
    sizes: list[Any] = []
    for axis, size in enumerate(large):
        kept = axis >= missing and str(small[axis - missing]) == str(size)
        free = not isinstance(size, int)
        batch = insert_call(node, aten.sym_size.int, (image, 0)) if free and not kept else -1
        sizes.append(batch if free else size)
    return sizes


def _single_result(node: fx.Node) -> _Call | None:
    source, number = node.args
    if not isinstance(source, fx.Node):
        return None
    target = _SINGLE_RESULTS.get((source.target, number))
    if target is None or source.kwargs:
        return None
    if target is aten.group_norm.default:
        x, weight, bias, _, _, _, groups, epsilon = source.args
        return target, (x, groups, weight, bias, epsilon)
    if target in (aten.amax.default, aten.amin.default):
        x, axis, *keep = source.args
        return target, (x, [axis], *keep)
    return target, source.args


def _convolution(node: fx.Node) -> _Call:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    rank = _rank(weight) - 2
    if transposed:
        return _TRANSPOSED[rank], (x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _CONVOLUTIONS[rank], (x, weight, bias, stride, padding, dilation, groups)


def _linear(x: Any, matrix: Any, bias: Any) -> _Call | None:
    """The linear layer that a product with a transposed parameter is."""
    if _TRANSPOSES.get(matrix.target) != tuple(matrix.args[1:]):
        return None
    weight = matrix.args[0]
    return (aten.linear.default, (x, weight, bias)) if weight.op == "get_attr" else None


def _rank(value: Any) -> int:
    return int(value.meta["val"].dim())
