"""Pools in normal form: each becomes an operator whose integer kernel computes what torch computes.

ONNX Runtime's integer kernels know neither adaptive pools nor a divisor of the user's own, and where the
last window hangs over a padded edge (``ceil_mode``) they divide by the whole window, unlike torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from metaaug_cli.graph.graph_tools import add_constant, insert_call
from metaaug_cli.graph.ops import is_global_pool

aten = torch.ops.aten

_ADAPTIVE_MAX_POOLS = {aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default}
_AVERAGE_RANKS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_AVERAGE_SETTINGS: dict[str, Any] = {
    "kernel_size": None,
    "stride": [],
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}


def plain_pool(node: fx.Node) -> fx.Node | None:
    """What computes a pool's value in normal form, inserted before it; None for what needs no change."""
    if node.target == aten.adaptive_avg_pool2d.default:
        return _adaptive_average(node)
    if node.target == aten.mean.dim:
        return _global_average(node)
    if node.target in _AVERAGE_RANKS:
        return _average(node)
    if node.target is operator.getitem and node.args[1] == 0:
        pool = node.args[0]
        if isinstance(pool, fx.Node) and pool.target in _ADAPTIVE_MAX_POOLS:
            return _adaptive_max(pool, node)
    return None


def _global_average(node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if x.meta["val"].dim() != 4 or is_global_pool(node):
        return None
    if sorted(axis % 4 for axis in node.args[1]) != [2, 3]:  # type: ignore[union-attr, operator]
        return None
    pooled = insert_call(node, aten.mean.dim, (x, [2, 3], True))
    if node.meta["val"].dim() == 4:
        return pooled
    return insert_call(node, aten.reshape.default, (pooled, [-1, int(x.meta["val"].shape[1])]))


def _adaptive_average(node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    sizes, out = _spatial(x, 2), _spatial(node, 2)
    if sizes == out:
        return x
    if out == [1, 1]:
        axes = [2, 3] if x.meta["val"].dim() == 4 else [-2, -1]
        return insert_call(node, aten.mean.dim, (x, axes, True))
    kernel = _dividing_window(sizes, out)
    return insert_call(node, aten.avg_pool2d.default, (x, kernel, kernel)) if kernel else None


def _adaptive_max(pool: fx.Node, values: fx.Node) -> fx.Node | None:
    """The greatest values of an adaptive pool, whose indices nobody reads."""
    x = pool.args[0]
    assert isinstance(x, fx.Node)
    rank = len(pool.args[1])  # type: ignore[arg-type]
    sizes, out = _spatial(x, rank), _spatial(values, rank)
    if sizes == out:
        return x
    kernel = _dividing_window(sizes, out)
    if kernel is None:
        x, sizes, kernel = _spread_windows(values, x, sizes, out)
    if rank == 2:
        return insert_call(values, aten.max_pool2d.default, (x, kernel, kernel))
    front = free_sizes(x.meta["val"].shape[:-1])
    image = insert_call(values, aten.reshape.default, (x, [*front, 1, *sizes]))
    pooled = insert_call(values, aten.max_pool2d.default, (image, [1, *kernel], [1, *kernel]))
    return insert_call(values, aten.reshape.default, (pooled, [*front, *out]))


def _spread_windows(
    values: fx.Node, x: fx.Node, sizes: list[int], out: list[int]
) -> tuple[fx.Node, list[int], list[int]]:
    """Adaptive windows of one size side by side: shorter ones repeat their last value, no greater maximum.

    Returns:
        The image with its windows laid out, its sizes and the window.
    """
    kernel = []
    for axis, (size, count) in enumerate(zip(sizes, out, strict=True), start=-len(sizes)):
        spans = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        longest = max(stop - start for start, stop in spans)
        places = [min(start + step, stop - 1) for start, stop in spans for step in range(longest)]
        kernel.append(longest)
        if places != list(range(size)):
            x = _picked(values, x, axis, places)
    return x, [k * count for k, count in zip(kernel, out, strict=True)], kernel


def _picked(node: fx.Node, x: fx.Node, axis: int, places: list[int]) -> fx.Node:
    module = node.graph.owning_module
    assert module is not None
    index = add_constant(module, node, "windows", torch.tensor(places))
    return insert_call(node, aten.index_select.default, (x, axis, index))


def free_sizes(shape: Iterable[Any]) -> list[int]:
    """A shape as a view asks for it: ``-1`` stands for the batch size."""
    return [size if isinstance(size, int) else -1 for size in shape]


def _spatial(node: fx.Node, rank: int) -> list[int]:
    return [int(size) for size in node.meta["val"].shape[-rank:]]


def _dividing_window(sizes: list[int], out: list[int]) -> list[int] | None:
    """The window whose multiples make up the image; None where adaptive windows differ in size."""
    if any(size % count for size, count in zip(sizes, out, strict=True)):
        return None
    return [size // count for size, count in zip(sizes, out, strict=True)]


@dataclass(frozen=True)
class _Windows:
    """The windows of an average pool, per axis.

    Args:
        kernel: Extent of a window.
        stride: Steps between windows.
        padding: Zeros on each side.
        beyond: How far the last window reaches past the padding; negative where it stops before its end.
    """

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    beyond: list[int]

    @property
    def overhang(self) -> bool:
        """Whether a window reaches past the padding, which ``ceil_mode`` alone allows."""
        return any(e > 0 for e in self.beyond)

    def average(self, node: fx.Node, *settings: Any) -> fx.Node:
        """A pool of the node's kind, by (input, padding, ceil_mode, count_include_pad)."""
        x, *rest = settings
        return insert_call(node, node.target, (x, self.kernel, self.stride, *rest))  # type: ignore[arg-type]

    def padded(self, node: fx.Node, *, full: bool) -> fx.Node:
        """The pool's input with its zeros written out, and cropped to what the windows cover.

        Args:
            node: The pool.
            full: Fill the last window with zeros too.
        """
        sides = [
            side
            for padding, beyond in zip(reversed(self.padding), reversed(self.beyond), strict=True)
            for side in (padding, padding + (beyond if full else min(beyond, 0)))
        ]
        return insert_call(node, aten.constant_pad_nd.default, (node.args[0], sides))


def _average(node: fx.Node) -> fx.Node | None:
    settings = _AVERAGE_SETTINGS | dict(zip(_AVERAGE_SETTINGS, node.args[1:], strict=False)) | node.kwargs
    windows = _windows(node, settings)
    if settings["divisor_override"] is not None:
        return _sum_over(node, windows, int(settings["divisor_override"]))
    x, with_padding = node.args[0], bool(settings["count_include_pad"])
    if not (settings["ceil_mode"] and (with_padding or not windows.overhang)):
        return None
    if not windows.overhang:
        return windows.average(node, x, windows.padding, False, with_padding)
    # What hangs over the padding does not count, what is padding does: so the zeros become part of the image.
    image = windows.padded(node, full=False) if any(windows.padding) else x
    return windows.average(node, image, [0] * len(windows.kernel), True, False)


def _sum_over(node: fx.Node, windows: _Windows, divisor: int) -> fx.Node:
    """The sum of each window by a divisor of the user's own, as an average times a number."""
    x, padding = node.args[0], windows.padding
    if windows.overhang:
        x, padding = windows.padded(node, full=True), [0] * len(padding)
    mean = windows.average(node, x, padding, False, True)
    count = math.prod(windows.kernel)
    return mean if count == divisor else insert_call(node, aten.mul.Tensor, (mean, count / divisor))


def _windows(node: fx.Node, settings: dict[str, Any]) -> _Windows:
    x, rank = node.args[0], _AVERAGE_RANKS[node.target]  # type: ignore[index]
    assert isinstance(x, fx.Node)
    kernel = _per_axis(settings["kernel_size"], rank)
    stride = _per_axis(settings["stride"] or kernel, rank)
    padding = _per_axis(settings["padding"], rank)
    axes = zip(_spatial(x, rank), _spatial(node, rank), kernel, stride, padding, strict=True)
    beyond = [(count - 1) * s + k - (size + 2 * p) for size, count, k, s, p in axes]
    return _Windows(kernel, stride, padding, beyond)


def _per_axis(value: int | list[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
