"""The table about what learning starts from: paired over calibration sets."""

from __future__ import annotations

from tables_common import Record, markdown, records, spread
from tables_metaaug import paired

_VARIANTS = ("nearest", "gptq", "genie from nearest", "genie from gptq")


def starts() -> str:
    """Top-1 from either start, without learning and with it."""
    cells: dict[tuple[str, str, int, int], dict[str, dict[int, Record]]] = {}
    for r in records("starts"):
        cell = (r["model"], r["bits"].upper(), r["num"], r["iterations"])
        cells.setdefault(cell, {}).setdefault(r["variant"], {})[r["seed"]] = r
    rows = []
    for cell, found in sorted(cells.items()):
        sets = [found.get(variant, {}) for variant in _VARIANTS]
        shown = [_accuracy(each) for each in sets]
        gains = [paired(sets[3], sets[2]), paired(sets[3], sets[2], key="divergence", places=3)]
        rows.append([*map(str, cell), *shown, *gains])
    header = ["network", "bits", "images", "iterations", *_VARIANTS]
    return markdown([*header, "gain of the start", "KL from float, difference"], rows)


def _accuracy(sets: dict[int, Record]) -> str:
    if not sets:
        return ""
    seconds = sorted(r["seconds"] for r in sets.values())[len(sets) // 2]
    return f"{spread([r['onnxruntime'] for r in sets.values()])} ({seconds:.0f} s)"
