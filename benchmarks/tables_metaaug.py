"""Tables about the learned augmenter: paired over calibration sets."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from statistics import mean, stdev

from tables_common import Record, markdown, records, spread

_BASE = "genie"
_MAIN = (
    "genie",
    "genie, twice the iterations",
    "pool",
    "policy",
    "policy, validation off",
    "policy+flip+crop",
    "residual",
    "residual, validation off",
    "residual+pool",
)


def _by_set(variant: str, **wanted: object) -> dict[int, Record]:
    found = [r for r in records("metaaug") if r["variant"] == variant]
    return {r["seed"]: r for r in found if all(r[k] == v for k, v in wanted.items())}


def paired(found: dict[int, Record], base: dict[int, Record]) -> str:
    """Mean difference on the same calibration sets, with its standard error and the number of sets."""
    shared = sorted(set(found) & set(base))
    gains = [found[s]["onnxruntime"] - base[s]["onnxruntime"] for s in shared]
    if not gains:
        return ""
    if len(gains) == 1:
        return f"{gains[0]:+.2f} (1)"
    return f"{mean(gains):+.2f} ± {stdev(gains) / sqrt(len(gains)):.2f} ({len(gains)})"


def _rows(variants: Iterable[str], **wanted: object) -> list[list[str]]:
    rows = []
    base = _by_set(_BASE, **wanted)
    for variant in variants:
        found = _by_set(variant, **wanted)
        if not found:
            continue
        values = list(found.values())
        distances = [d for r in values for d in r["distance"]]
        rows.append(
            [
                variant,
                spread([r["onnxruntime"] for r in values]),
                paired(found, base) if variant != _BASE else "",
                f"{min(distances):.2f} to {max(distances):.2f}" if distances else "",
                str(values[0]["iterations"]),
                str(len(values)),
            ]
        )
    return rows


_HEADER = ["variant", "top-1", "minus genie, same sets", "T's distance", "iterations", "sets"]


def main_table() -> str:
    """32 images, W2A2."""
    return markdown(_HEADER, _rows(_MAIN, bits="w2a2", num=32))


def four_bit_activations() -> str:
    """32 images, W2A4."""
    return markdown(_HEADER, _rows(_MAIN, bits="w2a4", num=32))


def ablation() -> str:
    """One change at a time."""
    others = dict.fromkeys(r["variant"] for r in records("metaaug") if r["variant"] not in _MAIN)
    return markdown(_HEADER, _rows(others, bits="w2a2", num=32))


def images() -> str:
    """Gain against the number of images."""
    rows = []
    for num in (32, 64, 128, 256, 512):
        base = _by_set(_BASE, bits="w2a2", num=num)
        if not base:
            continue
        row = [str(num), spread([r["onnxruntime"] for r in base.values()])]
        for variant in ("pool", "policy"):
            found = _by_set(variant, bits="w2a2", num=num)
            row += [spread([r["onnxruntime"] for r in found.values()]) if found else "", paired(found, base)]
        rows.append(row)
    return markdown(["images", "genie", "pool", "minus genie", "policy", "minus genie"], rows)


def speed() -> str:
    """Seconds of an outer step, ours and the obvious way."""
    rows = [
        [
            r["model"],
            r["block"],
            f"{r['batch']} / {r['validation']}",
            f"{r['seconds']:.3f}",
            f"{r['seconds_obvious']:.3f}",
            f"{r['ratio']:.2f}",
            f"{r['gradient_difference']:.1e}",
            f"{r['peak_memory_mib']:,}",
        ]
        for r in records("meta_speed")
    ]
    header = [
        "network",
        "block",
        "images / validation",
        "s/step",
        "s/step, obvious",
        "ratio",
        "gradients differ by",
    ]
    return markdown([*header, "peak MiB"], rows)
