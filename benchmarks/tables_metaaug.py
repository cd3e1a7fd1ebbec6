"""Tables about the learned augmenter: paired over calibration sets."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from math import sqrt
from statistics import mean, stdev

from tables_common import Record, markdown, records, spread

from metaaug_cli.augmentation.meta import TERMS
from metaaug_cli.recipe.augment_kinds import OPERATION_NAMES

_BASE = "genie"
_ITERATIONS, _SHORT, _LONG = 500, 200, 2_000
_COUNTS = (8, 32, 64, 128, 256, 512)
_BY_DEFAULT = {"iterations": _SHORT, "stem": 8, "start": "second-order"}
_REAL_512 = "genie, 512 real images instead"
_FIRST = {"bits": "w2a2", "num": 32, "iterations": _ITERATIONS}
_SYNTHETIC = "genie, 256 synthetic images too"
_PLAIN = "genie, 256 images from plain noise too"
_PUBLISHED = (
    "genie",
    "policy",
    "mixup",
    "pool",
    "policy+pool",
    _SYNTHETIC,
    "pool, 256 synthetic images too",
    "policy+pool, 256 synthetic images too",
    "genie, 512 real images instead",
)
_MAIN = (
    "genie",
    "genie, twice the iterations",
    "pool",
    "policy",
    "policy, validation off",
    _SYNTHETIC,
    "policy, 256 synthetic images too",
    _PLAIN,
    "policy, 256 images from plain noise too",
    "residual",
    "residual, validation off",
)


def _by_set(variant: str, **wanted: object) -> dict[int, Record]:
    found = [r for r in records("metaaug") if r["variant"] == variant and r["model"] == "resnet20"]
    wanted = {"stem": None, "start": None, **wanted}
    return {r["seed"]: r for r in found if all(r.get(k) == v for k, v in wanted.items())}


def paired(
    found: dict[int, Record], base: dict[int, Record], *, key: str = "onnxruntime", places: int = 2
) -> str:
    """Mean difference on the same calibration sets, with its standard error and the number of sets."""
    shared = sorted(s for s in set(found) & set(base) if key in found[s] and key in base[s])
    gains = [found[s][key] - base[s][key] for s in shared]
    if not gains:
        return ""
    if len(gains) == 1:
        return f"{gains[0]:+.{places}f} (1)"
    return f"{mean(gains):+.{places}f} ± {stdev(gains) / sqrt(len(gains)):.{places}f} ({len(gains)})"


def _rows(variants: Iterable[str], **wanted: object) -> list[list[str]]:
    base = _by_set(_BASE, **wanted)
    found = {variant: _by_set(variant, **wanted) for variant in variants}
    return [_row(variant, sets, base) for variant, sets in found.items() if sets]


def _row(variant: str, found: dict[int, Record], base: dict[int, Record]) -> list[str]:
    values = list(found.values())
    distances = [d for r in values for d in r["distance"]]
    return [
        variant,
        spread([r["onnxruntime"] for r in values]),
        paired(found, base) if variant != _BASE else "",
        f"{min(distances):.2f} to {max(distances):.2f}" if distances else "",
        str(values[0]["iterations"]),
        str(len(values)),
    ]


_HEADER = ["variant", "top-1", "minus genie, same sets", "T's distance", "iterations", "sets"]


def main_table() -> str:
    """32 images, W2A2."""
    once = [v for v in _MAIN if "twice" not in v]
    rows = _rows(once, **_FIRST)
    twice = _by_set("genie, twice the iterations", **_FIRST | {"iterations": 2 * _ITERATIONS})
    if twice:
        rows.insert(1, _row("genie, twice the iterations", twice, _by_set(_BASE, **_FIRST)))
    return markdown(_HEADER, rows)


def published() -> str:
    """The published code's placement, two lengths."""
    rows = []
    for iterations in (_ITERATIONS, _LONG):
        wanted = _FIRST | {"iterations": iterations, "stem": 8}
        base = _by_set(_BASE, **wanted)
        for variant in _PUBLISHED:
            found = _by_set(variant, **wanted | ({"num": 512} if variant == _REAL_512 else {}))
            if not found:
                continue
            rows.append([str(iterations), *_compared(variant, found, base)])
    return markdown(
        ["iterations", "variant", "top-1", "minus genie", "KL from float, minus genie", "sets"], rows
    )


def by_default() -> str:
    """By default: second-order start, first layer's output at 8 bits."""
    rows = []
    times = {"genie, twice the iterations": 2, "genie, three times the iterations": 3}
    variants = (
        *times,
        "mixup",
        "pool",
        "policy",
        "policy, validation off",
        "policy, inner sgd",
        "policy+pool",
        "policy+trivial-geometric",
        "unet",
        "residual",
        "residual, validation off",
        _SYNTHETIC,
    )
    for bits, num in product(("w2a2", "w2a4"), _COUNTS):
        wanted = _BY_DEFAULT | {"bits": bits, "num": num}
        base = _by_set(_BASE, **wanted)
        for variant in (_BASE, *variants):
            found = _by_set(variant, **wanted | {"iterations": _SHORT * times.get(variant, 1)})
            if not found:
                continue
            rows.append([bits.upper(), str(num), *_compared(variant, found, base)])
    header = ["bits", "images", "variant", "top-1", "minus genie", "KL from float, minus genie", "sets"]
    return markdown(header, rows)


def fixed_kinds() -> str:
    """Every fixed augmentation by default, the most helpful first; sets differ too much to leave some out."""
    wanted = _BY_DEFAULT | {"bits": "w2a2", "num": 32}
    base = _by_set(_BASE, **wanted)
    found = {kind: _by_set(kind, **wanted) for kind in (*OPERATION_NAMES, "pool", "policy")}
    gains = {
        kind: mean(r["onnxruntime"] - base[s]["onnxruntime"] for s, r in sets.items())
        for kind, sets in found.items()
        if set(sets) == set(base)
    }
    rows = [_compared(kind, found[kind], base) for kind in sorted(gains, key=gains.__getitem__, reverse=True)]
    return markdown(["kind", "top-1", "minus genie", "KL from float, minus genie", "sets"], rows)


def as_released() -> str:
    """The released code's settings in full, at its own rates."""
    rows = []
    for iterations in (5_000, 20_000):
        wanted = _FIRST | {"iterations": iterations, "stem": 8}
        base = _by_set(_BASE, **wanted)
        for variant in (_BASE, "unet as released"):
            if not (found := _by_set(variant, **wanted)):
                continue
            distances = [d for r in found.values() for d in r["distance"]]
            similarities = [x for r in found.values() for x in r["similarity"]]
            seen = [f"{min(v):.2f} to {max(v):.2f}" if v else "" for v in (distances, similarities)]
            *shown, sets = _compared(variant, found, base)
            rows.append([f"{iterations:,}", *shown, *seen, sets])
    header = ["iterations", "variant", "top-1", "minus genie", "KL from float, minus genie", "T's distance"]
    return markdown([*header, "T(x) recognised", "sets"], rows)


def _compared(variant: str, found: dict[int, Record], base: dict[int, Record]) -> list[str]:
    """Variant, top-1, both paired differences to the base, and the number of sets."""
    gains = ["", ""]
    if variant != _BASE:
        gains = [paired(found, base), paired(found, base, key="divergence", places=3)]
    return [variant, spread([r["onnxruntime"] for r in found.values()]), *gains, str(len(found))]


def ablation() -> str:
    """One change at a time."""
    changed = dict.fromkeys(
        r["variant"] for r in records("metaaug") if r["variant"] not in (*_MAIN, *OPERATION_NAMES)
    )
    variants = (_BASE, "policy", "policy, validation off", "residual", *changed)
    return markdown(_HEADER, _rows(variants, **_FIRST | {"iterations": _SHORT}))


def mobilenet() -> str:
    """224 and 128 px."""
    found = [r for r in records("metaaug") if r["model"].startswith("mobilenet_v1_075")]
    groups: dict[tuple[str, ...], dict[str, dict[int, Record]]] = {}
    for r in found:
        start = r.get("start", "nearest")
        cell = (_side(r), r["bits"].upper(), str(r["num"]), str(r["iterations"]), start, _computed_on(r))
        groups.setdefault(cell, {}).setdefault(r["variant"], {})[r["seed"]] = r
    rows = []
    for shown, variants in groups.items():
        for variant, sets in variants.items():
            base = variants.get(_BASE, {})
            minutes = mean(r["seconds"] for r in sets.values()) / 60
            rows.append([*shown, *_compared(variant, sets, base), f"{minutes:.0f}"])
    header = ["side", "bits", "images", "iterations", "start", "on", "variant", "top-1", "minus genie"]
    return markdown([*header, "KL from float, minus genie", "sets", "minutes"], rows)


def _side(record: Record) -> str:
    return "128 px" if "128 px" in record["model"] else "224 px"


def _computed_on(record: Record) -> str:
    computes = record["machine"].split(",")[0]
    return computes.split()[1] if computes.startswith("NVIDIA") else "CPU"


def images() -> str:
    """Gain against the number of images, short schedule."""
    rows = []
    others = ("pool", "policy", _SYNTHETIC, _PLAIN)
    for bits, num in product(("w2a2", "w2a4"), _COUNTS):
        wanted = {"bits": bits, "num": num, "iterations": _SHORT}
        base = _by_set(_BASE, **wanted)
        if base:
            gains = [paired(_by_set(variant, **wanted), base) for variant in others]
            rows.append([bits.upper(), str(num), spread([r["onnxruntime"] for r in base.values()]), *gains])
    return markdown(["bits", "images", "genie", *(f"{v.removeprefix('genie, ')}" for v in others)], rows)


def terms() -> str:
    """What the outer terms send to T, and what comes of it."""
    rows = [
        [
            r["variant"],
            *(f"{r[term]:.1e} ({middle:.1e})" for term, middle in zip(TERMS, r["medians"], strict=True)),
            f"{r['l_val_before']:.4f} → {r['l_val_after']:.4f}",
            f"{100 * r['lower']:.0f} %",
            f"{min(r['distance']):.2f} to {max(r['distance']):.2f}",
            f"{r['onnxruntime']:.2f}",
        ]
        for r in records("meta_terms")
    ]
    header = ["T and its outer step", "validation", "margin", "preservation", "L_val by the inner step"]
    return markdown([*header, "steps that lower it", "T's distance", "top-1"], rows)


_WAYS = ("ours", "obvious", "stopping")


def speed() -> str:
    """Outer and learning steps, ours and in two obvious ways: means over the blocks."""
    rows = []
    for blocks, run in _timed_cases():
        for kind in ("outer", "learning"):
            lines = [r for r in blocks if f"{kind}_ours" in r]
            ours = mean(r[f"{kind}_ours"] for r in lines)
            row = [run["model"], _computed_on(run), f"{run['batch']} / {run['validation']}", kind]
            row.append(f"{1000 * ours:,.1f}")
            for way in _WAYS[1:]:
                row += _times(lines, kind, way)
            rows.append(row)
    header = ["network", "on", "images / validation", "step", "ms", "obvious, ms", "times ours"]
    return markdown([*header, "stopping at the block, ms", "times ours"], rows)


def _times(lines: list[Record], kind: str, way: str) -> list[str]:
    if f"{kind}_{way}" not in lines[0]:
        return ["", ""]
    times = [r[f"{kind}_{way}"] / r[f"{kind}_ours"] for r in lines]
    return [f"{1000 * mean(r[f'{kind}_{way}'] for r in lines):,.1f}", f"{min(times):.1f} to {max(times):.1f}"]


def _timed_cases() -> list[tuple[list[Record], Record]]:
    """The lines of every block of a network, and the one of its run."""
    cases = []
    for name in ("meta_speed", "meta_speed_gpu"):
        found = records(name)
        for model in dict.fromkeys(r["model"] for r in found):
            lines = [r for r in found if r["model"] == model]
            cases.append(([r for r in lines if r["block"]], next(r for r in lines if not r["block"])))
    return cases


def speed_of_runs() -> str:
    """What the steps add up to, how far the ways' results are apart, and their memory."""
    rows = []
    for blocks, run in _timed_cases():
        ways = [w for w in _WAYS if f"outer_{w}" in run]
        ours, *others = (
            run["outer_steps"] * run[f"outer_{w}"] + run["iterations"] * run[f"learning_{w}"] for w in ways
        )
        shown = [f"{seconds / 60:,.1f} ({seconds / ours:.1f} times)" for seconds in others]
        differences = [r.get("difference", r.get("gradient_difference")) for r in blocks]
        known = [d for d in differences if d is not None]
        rows.append(
            [
                *(run["model"], _computed_on(run), f"{ours / 60:,.1f}"),
                *(shown + [""] * (len(_WAYS) - 1 - len(shown))),
                f"{max(known):.0e}" if known else "",
                " / ".join(f"{run['memory_mib'][w]:,}" for w in ways),
            ]
        )
    header = ["network", "on", "a run, minutes", "obvious", "stopping at the block", "results differ by"]
    return markdown([*header, "MiB: ours / obvious / stopping"], rows)


def gpu() -> str:
    """Learning and outer steps on a GPU."""
    rows = [
        [
            r["network"],
            str(r["batch"]),
            "replayed" if r["replayed"] else "as they are",
            f"{r['seconds_per_1000_iterations']:.1f}",
            f"{r['augmenter']}",
            f"{r['seconds_per_outer_step']:.3f}",
            f"{r['peak_gpu_memory_mib']:,}",
        ]
        for r in records("gpu_cost")
    ]
    header = ["network", "images", "steps", "s / 1 000 iterations of all blocks", "T", "s / outer step"]
    return markdown([*header, "MiB of GPU tensors"], rows)
