"""Which dimension of an activation holds its channels: convolutions put them first, linear layers last."""

from __future__ import annotations

from torch import fx

from metaaug_cli.graph.ops import aten, is_activation, tensor_inputs

_FIRST = {
    aten.conv2d.default,
    aten.conv1d.default,
    aten.conv_transpose2d.input,
    aten.batch_norm.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
    aten.upsample_nearest2d.vec,
}
_LAST = {
    aten.linear.default,
    aten.layer_norm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
}
_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}


def channel_axis(node: fx.Node) -> int:
    """The dimension of the channels in ``node``'s value (N, …), at least 1.

    It is traced back to the layer that made the value. Where a reshape mixes channels with something else,
    (N, T, C) has them last and (N, C, H, W) second.
    """
    dims = node.meta["val"].dim()
    if node.target in _FIRST:
        return 1
    if node.target in _LAST:
        return dims - 1
    sources = tensor_inputs(node)
    if not is_activation(node) or not sources:
        return _usual(dims)
    source = next((n for n in sources if n.target in _FIRST | _LAST), sources[0])
    return _moved(node, source, channel_axis(source))


def _moved(node: fx.Node, source: fx.Node, axis: int) -> int:
    """Where ``node`` has the dimension that is ``axis`` in its ``source``."""
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if node.target == aten.permute.default:
        return [d % len(before) for d in node.args[1]].index(axis)  # type: ignore[union-attr, operator]
    if node.target == aten.transpose.int:
        one, other = (int(d) % len(before) for d in node.args[1:3])  # type: ignore[arg-type]
        return {one: other, other: one}.get(axis, axis)
    if node.target in _RESHAPES:
        if axis == len(before) - 1 and after[-1] == before[-1]:
            return len(after) - 1
        return 1 if axis == 1 and after[1] == before[1] else _usual(len(after))
    return axis if len(before) == len(after) else _usual(len(after))


def _usual(dims: int) -> int:
    return dims - 1 if dims == 3 else 1
