"""The line chart: well-formed SVG whose lines are where the values are."""

import math
import re
from xml.etree import ElementTree

import pytest

from metaaug_cli.runs.line_chart import Line, _ticks, line_chart


def points(svg):
    """Where the first line's points are."""
    path = re.search(r'class="line line0"[^>]*d="M([\d.,L]+)"/>', svg).group(1)
    return [tuple(map(float, pair.split(","))) for pair in path.split("L")]


def texts(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter("text")]


def test_points_are_placed_in_proportion():
    svg = line_chart("a <title>", [Line("x & y", [(0, 0.0), (5, 1.0), (10, 2.0)])])
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y1, "larger is higher"
    assert {"a <title>", "x & y", "step 10", "0", "2"} <= set(texts(svg))


def test_decades_are_equally_far_apart_on_a_log_scale():
    svg = line_chart("t", [Line("g", [(0, 1e-4), (1, 1e-2), (2, 1.0)])], log=True)
    rows = [y for _, y in points(svg)]
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=0.11)


def test_a_line_of_zeros_is_named_as_such_where_zero_cannot_be_drawn():
    svg = line_chart(
        "t", [Line("validation", [(0, 0.0)]), Line("margin", [(0, 1.0), (1, math.nan)])], log=True
    )
    assert "validation: 0" in texts(svg)
    assert "nan" not in svg


def test_the_limit_is_inside_the_chart():
    svg = line_chart("t", [Line("d", [(0, 0.01), (3, 0.02)])], limit=("epsilon", 0.3))
    assert "epsilon" in texts(svg)
    row = float(re.search(r'class="limit"[^>]*d="M\d+,([\d.]+)H', svg).group(1))
    assert 48 <= row <= 186


@pytest.mark.parametrize("lines", [[], [Line("none", [])], [Line("same", [(0, 5.0), (1, 5.0)])]])
@pytest.mark.parametrize("log", [True, False])
def test_little_to_draw_is_no_trouble(lines, log):
    ElementTree.fromstring(line_chart("t", lines, log=log))


@pytest.mark.parametrize("low", [0.0, 1e-9, 0.7, -3.0])
@pytest.mark.parametrize("high", [1e-8, 0.9, 3.0, 12345.0])
def test_round_ticks_enclose_the_values(low, high):
    ticks = _ticks([low, high], log=False)
    assert ticks[0] <= min(low, high, 0) + 1e-12
    assert ticks[-1] >= max(low, high) * (1 - 1e-9)
    assert 2 <= len(ticks) <= 9
