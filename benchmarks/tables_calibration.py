"""Tables about calibration sets: made without images, judged, searched for copies."""

from __future__ import annotations

import re
from collections import defaultdict

from tables_common import Record, markdown, records, spread
from tables_metaaug import paired

_KINDS = ("real", "dgh", "dgh from plain noise", "published distance", "noise")


def data_free(model: str) -> str:
    """Real, synthetic and noise images side by side; with each idea removed where no other table has it."""
    found = [r for r in records("data_free") if r["model"] == model and "start" not in r]
    seen = {r["images_from"] for r in found}
    changed = () if model == "resnet20" else sorted(seen - set(_KINDS))
    return _data_free(found, (*(k for k in _KINDS if k in seen), *changed))


def data_free_default(model: str) -> str:
    """So too, rounded by second order and by default in everything else."""
    found = [r for r in records("data_free") if r["model"] == model and "start" in r]
    seen = {r["images_from"] for r in found}
    return _data_free(found, tuple(k for k in _KINDS if k in seen))


def data_free_default_ablation() -> str:
    """MobileNet-V1 at 128 px by default: paired differences to the unchanged images on the same seeds."""
    found = [r for r in records("data_free") if r["model"].endswith("128 px") and "start" in r]
    changed = sorted({r["images_from"] for r in found} - set(_KINDS))
    cells: dict[tuple[object, ...], dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for r in found:
        cells[_cell(r)][r["images_from"]][r["seed"]] = r
    rows = []
    for (bits, placement, method, _), sets in cells.items():
        if not sets.keys() & set(changed):
            continue
        unchanged = spread([r["onnxruntime"] for r in sets["dgh"].values()])
        differences = [paired(sets[kind], sets["dgh"]) for kind in ("dgh from plain noise", *changed)]
        rows.append([str(bits).upper(), str(placement), str(method), unchanged, *differences])
    names = [kind.removeprefix("dgh ") for kind in ("dgh from plain noise", *changed)]
    return markdown(["bits", "placement", "method", "dgh", *names], rows)


def data_free_ablation() -> str:
    """ResNet-20's synthetic images with each idea removed or changed."""
    found = [r for r in records("data_free") if r["model"] == "resnet20" and "start" not in r]
    changed = {r["images_from"] for r in found} - set(_KINDS)
    cells = {_cell(r) for r in found if r["images_from"] in changed}
    unchanged = ("dgh", "dgh from plain noise", "published distance")
    return _data_free([r for r in found if _cell(r) in cells], (*unchanged, *sorted(changed)))


def _cell(record: Record) -> tuple[object, ...]:
    return tuple(record[key] for key in ("bits", "placement", "method", "iterations"))


def _data_free(found: list[Record], kinds: tuple[str, ...]) -> str:
    rows = []
    groups: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in found:
        learned = r["method"] not in ("nearest", "gptq")
        method = f"{r['method']}, {r['iterations']}" if learned else r["method"]
        groups[r["bits"], r["placement"], method][r["images_from"]].append(r["onnxruntime"])
    for (bits, placement, method), values in groups.items():
        cells = [f"{spread(values[k])} ({len(values[k])})" if k in values else "" for k in kinds]
        if any(cells):
            rows.append([bits.upper(), placement, method, *cells])
    return markdown(["bits", "placement", "method", *kinds], rows)


def data_free_cost() -> str:
    """Time and memory of the synthesis."""
    rows = [
        [
            r["model"],
            f"{r['side']} px",
            str(r["num"]),
            "GPU" if "device" in r else "CPU",
            f"{r['minutes_at_default']:.1f}",
            f"{r['peak_gpu_memory_mib' if 'device' in r else 'peak_memory_mib']:,}",
            "" if "device" in r else f"{r['peak_memory_mib_before']:,}",
            f"{r['load']:.1f}",
        ]
        for r in records("data_free_cost")
    ]
    return markdown(
        ["network", "side", "images", "on", "minutes", "peak MiB there", "MiB before it", "load"], rows
    )


def calibration_check() -> str:
    """How many of the judged sets were found unsuitable, and as what."""
    groups: dict[str, dict[tuple[str, int], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records("calibration_check"):
        groups[r["kind"]][r["model"], r["num"]].append(r)
    columns = sorted(
        {column for group in groups.values() for column in group}, key=lambda c: (c[0] != "resnet20", c[1])
    )
    rows = []
    for kind, group in groups.items():
        cells = []
        for column in columns:
            found = group.get(column, [])
            cells.append(f"{sum(bool(r['findings']) for r in found)} of {len(found)}" if found else "")
        everything = [r for part in group.values() for r in part]
        distances = [r["distance"] for r in everything]
        rows.append([kind, *cells, f"{min(distances):.2f} to {max(distances):.2f}", _named(everything)])
    names = {"resnet20": "ResNet-20", "mobilenet": "MobileNet-V1"}
    header = ["images", *(f"{names[model]}, {num}" for model, num in columns), "distance", "named first as"]
    return markdown(header, rows)


def _named(group: list[Record]) -> str:
    first = [re.sub(r"^(\w+): \1$", r"\1", r["findings"][0]) for r in group if r["findings"]]
    counts = {name: first.count(name) for name in sorted(set(first))}
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({count})" for name, count in ordered)


def duplicates() -> str:
    """Share of changed copies that are recognised."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for r in records("duplicates"):
        found[r["change"]][r["data"]] = f"{r['found']} of {r['images']}"
    rows = [[change, row.get("cifar10", ""), row.get("imagenet", "")] for change, row in found.items()]
    return markdown(["change", "CIFAR-10, 32 px", "ImageNet, 224 px"], rows)
