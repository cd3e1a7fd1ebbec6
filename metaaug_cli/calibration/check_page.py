"""The part of a calibration set's page that says whether the set suits a model."""

from __future__ import annotations

import html
from collections.abc import Sequence

from metaaug_cli.calibration.check import DISTANCE_LIMIT, Check, LayerDistance

_PLOT = (640, 150)
_TOP = 1.5
_LEAST_TOP = 0.5
_BAR = "#3b74d8"
_BEYOND = "#d6453d"


def verdict(check: Check) -> str:
    """The sentence, and under it every finding with what to do about it."""
    kind = "good" if check.suits else "bad"
    mark = "Suits" if check.suits else "Does not suit"
    found = "".join(f"<li>{html.escape(line[0].upper() + line[1:])}.</li>" for line in check.advice)
    listed = f'<ul class="findings">{found}</ul>' if found else ""
    return f'<div class="verdict {kind}"><strong>{mark}.</strong> {html.escape(check.sentence)}{listed}</div>'


def distances(check: Check) -> str:
    """Distance of every batch norm as a chart, with the numbers folded away below it."""
    rows = "".join(
        f"<tr><th>{html.escape(layer.name)}</th><td>{layer.distance:.3f}</td></tr>" for layer in check.layers
    )
    facts = [f"{check.images} images looked at", f"{check.distance:.3f} over all layers"]
    if check.classes is not None and check.classes_expected is not None:
        facts.append(
            f"about {check.classes:.0f} classes predicted (random images: about {check.classes_expected:.0f})"
        )
    if check.grey_share is not None:
        facts.append(f"{check.grey_share:.0%} without colour")
    return (
        "<h2>Distance to the model's training images</h2>"
        "<p>What each batch norm sees of this set, against what it stored when the model was trained, in"
        " stored standard deviations; 0 is alike. The dashed line is the limit for all layers together:"
        f" {DISTANCE_LIMIT}.</p><p>{'; '.join(facts)}.</p>"
        f"{_chart(check.layers)}<details><summary>{len(check.layers)} layers in numbers</summary>"
        f'<table class="numbers"><tbody>{rows}</tbody></table></details>'
    )


def _chart(layers: Sequence[LayerDistance]) -> str:
    """A bar per layer in execution order, as inline SVG; bars beyond the chart are cut."""
    width, height = _PLOT
    largest = max(layer.distance for layer in layers)
    top = min(max(largest * 1.1, _LEAST_TOP), _TOP)
    step = width / len(layers)
    bars = []
    for index, layer in enumerate(layers):
        tall = min(layer.distance / top, 1) * height
        ink = _BAR if layer.distance <= DISTANCE_LIMIT else _BEYOND
        bars.append(
            f'<rect x="{index * step:.1f}" y="{height - tall:.1f}" width="{max(step * 0.8, 0.5):.1f}"'
            f' height="{tall:.1f}" fill="{ink}"><title>{html.escape(layer.name)}: {layer.distance:.3f}'
            "</title></rect>"
        )
    limit = height - DISTANCE_LIMIT / top * height
    cut = " (cut)" if largest > top else ""
    label = "Distance of each layer to its stored statistics"
    return (
        f'<svg viewBox="-44 -8 {width + 48} {height + 30}" role="img" aria-label="{label}" font-size="11"'
        f' fill="#888">{"".join(bars)}'
        f'<line x1="0" y1="{height}" x2="{width}" y2="{height}" stroke="#888"/>'
        f'<line x1="0" y1="{limit:.1f}" x2="{width}" y2="{limit:.1f}" stroke="#888" stroke-dasharray="5 4"/>'
        f'<text x="-6" y="{limit + 4:.1f}" text-anchor="end">{DISTANCE_LIMIT}</text>'
        f'<text x="-6" y="4" text-anchor="end">{top:.2f}{cut}</text>'
        f'<text x="-6" y="{height + 4}" text-anchor="end">0</text>'
        f'<text x="0" y="{height + 16}">first layer</text>'
        f'<text x="{width}" y="{height + 16}" text-anchor="end">last layer</text></svg>'
    )
