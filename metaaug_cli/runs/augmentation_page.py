"""``augmentation/index.html``: what the learned augmenter did, block by block, in a user's words."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from metaaug_cli.augmentation.learned import distance_note, similarity_note
from metaaug_cli.augmentation.meta import TERMS, MetaRecord
from metaaug_cli.runs.line_chart import STYLE, Line, line_chart

_STYLE = f"""
:root {{ color-scheme: light dark; --first: #0b62c4; --second: #c2410c; --third: #15803d; --faint: #8884 }}
@media (prefers-color-scheme: dark) {{ :root {{ --first: #6db3ff; --second: #ffa268; --third: #5fd38a }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ margin-top: 3rem; border-top: 1px solid var(--faint); padding-top: 1rem }}
p, li {{ max-width: 46rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--faint) }}
th {{ vertical-align: bottom }} th:first-child, td:first-child {{ text-align: left }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem }}
.note {{ border-left: 4px solid var(--second); padding-left: .8rem }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated; background: white }}
{STYLE}"""
_INTRO = """<p>Each block of the network is learned on the calibration images x and on changed copies of them,
T(x). T is a small network that looks for changes after which the block works better on the original images;
it goes on learning from block to block. The first block does without it; the last learns on its images, but
teaches it nothing.</p>"""
_COLUMNS = """<p>A block's error is the squared difference between its outputs after quantization and in
floating point. An error on images that nothing was learned from well above the error on the originals means
that the block has learned the originals by heart; what T is for is to make that gap smaller.</p>"""
_NO_HOLDOUT = "<p>No images were held back. <code>--holdout N</code> keeps N of them to measure the gap.</p>"
_EXPLAINED = """<ul>
<li><b>Disagreement</b>: how far the network's answers are from those of the float network, on original
images, with the blocks up to this one quantized: before and after the block learns one step from T(x). T is
taught to make the second smaller.</li>
<li><b>Change of what the network sees</b>: the preservation term. 0 means that T(x) looks to the float
network like x.</li>
<li><b>Distance</b>: mean (T(x) − x)² as a share of the images' variance. 0 is no change; epsilon is the
distance the recipe aims at or allows.</li>
<li><b>Pull on T</b>: the size of each term's gradient. A term far below the others has no say in what T
becomes.</li>
<li><b>Recognised</b>: cosine similarity between the float network's features of x and T(x). 1 is no
change.</li></ul>"""


@dataclass(frozen=True)
class Taught:
    """What one block taught T.

    Args:
        records: Recorded outer steps.
        distance: Mean (T(x) - x)^2 over all images, as a share of their variance.
        similarity: Of the float network's features of x and T(x).
        epsilon: The distance aimed at, in the same unit.
        variance: Of the images; the unit of the records' distances is 1 / variance.
        sheet: PNG of originals and T(x).
    """

    records: Sequence[MetaRecord]
    distance: float
    similarity: float
    epsilon: float
    variance: float
    sheet: bytes


@dataclass(frozen=True)
class BlockView:
    """One finished block: its name, ``BlockHistory.losses``, and what it taught T, if it did."""

    name: str
    losses: dict[str, float]
    taught: Taught | None


def augmentation_page(blocks: Sequence[BlockView], total: int) -> str:
    """The page for the blocks that are finished, of ``total``; it needs no other file and no script."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Learned augmentation</title><style>{_STYLE}</style></head><body>",
        f"<h1>What the learned augmenter did</h1>{_INTRO}",
        f"<p>{len(blocks)} of {total} blocks are finished.</p>",
        _gap_table(blocks),
        f"<h2>How to read the charts</h2>{_EXPLAINED}",
        *(_section(block.name, block.taught) for block in blocks if block.taught is not None),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _gap_table(blocks: Sequence[BlockView]) -> str:
    titles = [
        "block",
        "T(x): distance",
        "T(x): recognised",
        "error on x and T(x)",
        "error on x",
        "error on images held back",
        "held back / x",
    ]
    held = any("held_back" in block.losses for block in blocks)
    shown = titles if held else titles[:5]
    rows = ["".join(f"<th>{title}</th>" for title in shown)]
    rows += ["".join(f"<td>{cell}</td>" for cell in _cells(block)[: len(shown)]) for block in blocks]
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>Blocks</h2><table>{table}</table>{_COLUMNS}{'' if held else _NO_HOLDOUT}"


def _cells(block: BlockView) -> list[str]:
    taught, losses = block.taught, block.losses
    seen = [None, None] if taught is None else [taught.distance, taught.similarity]
    originals, held_back = losses.get("originals"), losses.get("held_back")
    ratio = held_back / originals if held_back is not None and originals else None
    values = [*seen, losses.get("trained"), originals, held_back]
    numbers = ["–" if value is None else f"{value:.3g}" for value in values]
    return [escape(block.name), *numbers, "–" if ratio is None else f"{ratio:.2f}"]


def _section(name: str, taught: Taught) -> str:
    found = [distance_note(taught.distance, taught.epsilon), similarity_note(taught.similarity)]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in found if note is not None)
    picture = base64.b64encode(taught.sheet).decode()
    sheet = f'<p><img alt="originals x above, T(x) below" src="data:image/png;base64,{picture}"></p>'
    charts = "".join(f"<div>{chart}</div>" for chart in _charts(taught))
    return f'<h2>{escape(name)}</h2>{notes}{sheet}<div class="charts">{charts}</div>'


def _charts(taught: Taught) -> list[str]:
    def line(name: str, values: list[float]) -> Line:
        return Line(name, [(r.step, v) for r, v in zip(records, values, strict=True)])

    records = taught.records
    return [
        line_chart(
            "Disagreement with float on original images",
            [
                line("before the step", [r.validation_before for r in records]),
                line("after", [r.validation for r in records]),
            ],
        ),
        line_chart(
            "Change of what the network sees", [line("preservation term", [r.preservation for r in records])]
        ),
        line_chart(
            "Distance of T(x) from x",
            [line("mean (T(x) − x)²", [r.distance / taught.variance for r in records])],
            limit=("epsilon", taught.epsilon),
        ),
        line_chart(
            "Pull of each term on T (gradient norm)",
            [line(name, [r.gradients[term] for r in records]) for term, name in enumerate(TERMS)],
            log=True,
        ),
    ]
