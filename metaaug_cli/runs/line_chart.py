"""A line chart as SVG text: no script, no library, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 48, 34
_DASHES = ("", "7 3", "2 3")
_LETTER = 6.4  # px, of the labels' font
_LEVELS = 5

STYLE = """
svg text { font: 11px system-ui, sans-serif; fill: currentColor }
svg .title { font-weight: 600; font-size: 12px }
svg .axis { stroke: currentColor; stroke-opacity: .25 }
svg .limit { stroke: currentColor; stroke-opacity: .7 }
svg .line { fill: none; stroke-width: 2 }
svg .line0 { stroke: var(--first) } svg .line1 { stroke: var(--second) } svg .line2 { stroke: var(--third) }
"""


@dataclass(frozen=True)
class Line:
    """One line: its name and points (x, y); values that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str, lines: Sequence[Line], *, log: bool = False, limit: tuple[str, float] | None = None
) -> str:
    """Up to three lines over a common axis of steps.

    Args:
        title: Above the chart.
        lines: The colours and dashes follow their order.
        log: Logarithmic values; zeros are left out and the line's name says so where it has nothing else.
        limit: Name and value of a horizontal line.
    """
    shown = [Line(line.name, [p for p in line.points if _fits(p[1], log)]) for line in lines]
    values = [y for line in shown for _, y in line.points] + ([limit[1]] if limit else [])
    last = max((x for line in shown for x, _ in line.points), default=1) or 1
    ticks = _ticks(values or [1.0], log)
    low, high = (_scaled(t, log) for t in (ticks[0], ticks[-1]))

    def place(x: float, y: float) -> str:
        return f"{_LEFT + x / last * (_WIDTH - _LEFT - _RIGHT):.1f},{_row(_scaled(y, log), low, high):.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>']
    parts.append(f'<text class="title" x="0" y="14">{escape(title)}</text>')
    parts += [_tick(t, _row(_scaled(t, log), low, high)) for t in ticks]
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 14}" text-anchor="middle">0</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 14}" text-anchor="end">step {last:g}</text>')
    if limit is not None:
        y = _row(_scaled(limit[1], log), low, high)
        parts.append(_stroke("limit", f"M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}", "4 4"))
    for number, line in enumerate(shown):
        path = "M" + "L".join(place(x, y) for x, y in line.points) if line.points else ""
        parts.append(_stroke(f"line line{number}", path, _DASHES[number]))
    parts += _legend(shown, limit)
    return "".join([*parts, "</svg>"])


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _row(value: float, low: float, high: float) -> float:
    return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _ticks(values: Sequence[float], log: bool) -> list[float]:
    """At most six round values around all others: powers of ten, or multiples of 1, 2 or 5 times one."""
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, math.ceil((last - first) / _LEVELS))
        return [10.0**e for e in range(first, max(last, first + 1) + stride, stride)]
    low = min(low, 0.0)
    step = _round_step(max(high - low, 1e-12) / _LEVELS)
    return [step * n for n in range(math.floor(low / step), max(math.ceil(high / step), 1) + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _tick(value: float, y: float) -> str:
    return (
        f'<path class="axis" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    )


def _stroke(kind: str, path: str, dashes: str) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path class="{kind}" fill="none"{dashed} d="{path}"/>' if path else ""


def _legend(lines: Sequence[Line], limit: tuple[str, float] | None) -> list[str]:
    named = [
        (f"line line{n}", line.name if line.points else f"{line.name}: 0", _DASHES[n])
        for n, line in enumerate(lines)
    ]
    if limit is not None:
        named.append(("limit", limit[0], "4 4"))
    parts, x = [], 0.0
    for kind, name, dashes in named:
        parts.append(_stroke(kind, f"M{x:.0f},28h20", dashes))
        parts.append(f'<text x="{x + 24:.0f}" y="32">{escape(name)}</text>')
        x += 38 + _LETTER * len(name)
    return parts
