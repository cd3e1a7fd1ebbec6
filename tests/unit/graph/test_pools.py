"""Pools in normal form compute what torch's own modules compute, also at their borders."""

import pytest
import torch
from networks import targets
from torch import nn

from metaaug_cli.errors import GraphError
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.ops import aten


class Pooled(nn.Module):
    """A pool of images, or of their rows joined where it takes (N, C, L)."""

    def __init__(self, pool, flat=False):
        super().__init__()
        self.pool, self.flat = pool, flat

    def forward(self, x):
        return self.pool(x.flatten(2) if self.flat else x)


def normal_form(pool, size, flat=False):
    """The captured pool; it agrees with torch's module on images of several batch sizes."""
    network = Pooled(pool, flat).eval()
    module = capture(network, size)
    for count in (1, 3):
        x = torch.randn(count, *size, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)
    return module


def settings_of(module):
    """(kernel, stride, padding, ceil_mode, count_include_pad) of the only average pool."""
    (node,) = [n for n in module.graph.nodes if "avg_pool" in str(n.target)]
    given, defaults = node.args[1:], ([], [0, 0], False, True)
    return (*given, *defaults[len(given) - 1 :])


AVERAGES = {
    "padding counts": nn.AvgPool2d(3, 2, 1),
    "padding does not count": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil": nn.AvgPool2d(2, ceil_mode=True),
    "ceil, padding counts": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "ceil, padding does not count": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "ceil, gaps between windows": nn.AvgPool2d((3, 2), (3, 5), 1, ceil_mode=True),
    "ceil, a last window outside the image": nn.AvgPool2d(3, 3, 1, ceil_mode=True),
    "divisor": nn.AvgPool2d(3, 2, 1, divisor_override=4),
    "divisor, ceil": nn.AvgPool2d((2, 3), 2, 1, ceil_mode=True, divisor_override=1),
    "divisor of the window": nn.AvgPool2d(2, ceil_mode=True, divisor_override=4),
    "negative divisor": nn.AvgPool2d(2, divisor_override=-3),
}


@pytest.mark.parametrize("pool", AVERAGES.values(), ids=AVERAGES.keys())
@pytest.mark.parametrize("height", [8, 9, 10])
def test_an_average_pool_keeps_its_values(pool, height):
    module = normal_form(pool, (2, height, 11))
    _, _, _, ceil_mode, with_padding = settings_of(module)
    assert not (ceil_mode and with_padding), "ONNX Runtime divides such a window's border by the whole kernel"


def test_an_average_pool_without_overhang_needs_no_ceiling():
    module = normal_form(nn.AvgPool2d(2, ceil_mode=True), (2, 8, 8))
    assert targets(module) == ["avg_pool2d"]
    assert settings_of(module) == ([2, 2], [2, 2], [0, 0], False, True)


def test_an_overhang_over_padding_writes_the_padding_out():
    module = normal_form(nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 8, 8))
    assert targets(module) == ["constant_pad_nd", "avg_pool2d"]
    assert settings_of(module) == ([3, 3], [2, 2], [0, 0], True, False)
    without = normal_form(nn.AvgPool2d(2, ceil_mode=True), (2, 9, 9))
    assert targets(without) == ["avg_pool2d"]
    assert settings_of(without) == ([2, 2], [2, 2], [0, 0], True, False)


def test_a_divisor_is_a_factor():
    module = normal_form(nn.AvgPool2d(2, divisor_override=1), (2, 8, 8))
    assert targets(module) == ["avg_pool2d", "mul"]
    (factor,) = [n.args[1] for n in module.graph.nodes if n.target == aten.mul.Tensor]
    assert factor == 4.0
    assert targets(normal_form(nn.AvgPool2d(2, divisor_override=4), (2, 8, 8))) == ["avg_pool2d"]


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool1d(2, ceil_mode=True),
        nn.AvgPool1d(4, 3, 1, ceil_mode=True),
        nn.AvgPool1d(4, 3, 1, ceil_mode=True, count_include_pad=False),
    ],
)
def test_an_average_pool_of_rows_keeps_its_values(pool):
    module = normal_form(pool, (2, 5, 5), flat=True)
    assert settings_of(module)[-2:] == (True, False)


@pytest.mark.parametrize(
    ("pool", "flat", "expected"),
    [
        (nn.AdaptiveMaxPool2d(1), False, ["max_pool2d"]),
        (nn.AdaptiveMaxPool2d((2, 3)), False, ["max_pool2d"]),
        (nn.AdaptiveMaxPool2d((None, 1)), False, ["max_pool2d"]),
        (nn.AdaptiveMaxPool2d((4, 6)), False, []),
        (nn.AdaptiveMaxPool2d((1, 8)), True, ["reshape", "max_pool2d"]),
        (nn.AdaptiveMaxPool1d(1), True, ["reshape", "reshape", "max_pool2d", "reshape"]),
        (nn.AdaptiveMaxPool1d(8), True, ["reshape", "reshape", "max_pool2d", "reshape"]),
    ],
)
def test_adaptive_max_pools_have_windows(pool, flat, expected):
    assert targets(normal_form(pool, (2, 4, 6), flat)) == expected


@pytest.mark.parametrize(
    ("pool", "flat", "expected"),
    [
        (nn.AdaptiveMaxPool2d(3), False, ["index_select", "max_pool2d"]),
        (nn.AdaptiveMaxPool2d((3, 5)), False, ["index_select", "index_select", "max_pool2d"]),
        (nn.AdaptiveMaxPool2d((6, 9)), False, ["index_select", "index_select", "max_pool2d"]),
        (nn.AdaptiveMaxPool1d(7), True, ["reshape", "index_select", "reshape", "max_pool2d", "reshape"]),
    ],
)
def test_uneven_adaptive_max_pools_lay_their_windows_side_by_side(pool, flat, expected):
    assert targets(normal_form(pool, (2, 4, 6), flat)) == expected


def test_an_adaptive_max_pool_whose_places_are_read_is_refused():
    class Both(Pooled):
        def forward(self, x):
            values, places = self.pool(x)
            return values + places

    pool = nn.AdaptiveMaxPool2d(1, return_indices=True)
    with pytest.raises(GraphError, match=r"adaptive_max_pool2d.* gives several values .*self\.pool\(x\)\)"):
        capture(Both(pool), (2, 4, 4))


@pytest.mark.parametrize(
    ("out", "expected"), [((1, 1), ["reshape", "mean"]), ((1, 8), ["reshape", "avg_pool2d"])]
)
def test_adaptive_average_pools_of_rows(out, expected):
    assert targets(normal_form(nn.AdaptiveAvgPool2d(out), (2, 4, 6), flat=True)) == expected
