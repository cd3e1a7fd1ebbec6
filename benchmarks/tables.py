"""Write the measured tables of docs/benchmarks.md and README.md from benchmarks/results/*.jsonl.

``python benchmarks/tables.py`` replaces the text between ``<!-- table: NAME -->`` and ``<!-- end -->`` in
both files and draws docs/images/accuracy.svg. No number in those tables is typed by hand.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import mean, median

import tables_calibration
import tables_deployment
import tables_metaaug
import tables_starts
from tables_common import ROOT, Record, markdown, records, spread

from metaaug_cli.recipe.config import load_recipe

FILES = [ROOT / "docs/benchmarks.md", ROOT / "docs/guides/calibration-sets.md", ROOT / "README.md"]
PICTURE = ROOT / "docs/images/accuracy.svg"

# Genie's published code on the same network: 10 000 test images, one seed, second layer's input at 8 bits.
AUTHORS = {"w4a4": 87.65, "w2a4": 83.21, "w2a2": 73.08}


def _accuracy(model: str, **wanted: object) -> list[Record]:
    found = [r for r in records("accuracy") if r["model"] == model and not {"lr_scale", "stem"} & r.keys()]
    return [r for r in found if all(r[k] == v for k, v in wanted.items())]


def _row(group: list[Record], label: Sequence[str]) -> list[str]:
    float_top1 = group[0]["float"]
    return [
        *label,
        spread([r["onnxruntime"] for r in group]),
        spread([r["onnxruntime"] - float_top1 for r in group]),
        spread([r["agreement_float"] for r in group]),
        f"{min(r['agreement_simulated'] for r in group):.2f}",
        f"{group[0]['integer_nodes']} of {group[0]['nodes']}",
        str(len(group)),
    ]


_COLUMNS = ["top-1", "against float", "agreement", "ORT = simulated", "integer nodes", "seeds"]


def resnet20_w8a8() -> str:
    """W8A8 nearest, both placements."""
    groups = [(p, _accuracy("resnet20", bits="w8a8", placement=p)) for p in ("integer", "academic")]
    return markdown(["placement", *_COLUMNS], [_row(g, [p]) for p, g in groups if g])


def resnet20_short() -> str:
    """256 images, 300 iterations."""
    return _bits_by_placement(_accuracy("resnet20", num=256, iterations=300))


def resnet20_stem() -> str:
    """The same with the first layer's output at 8 bits, as by default and in the published code."""
    return _bits_by_placement([r for r in records("accuracy") if r.get("stem") == 8 and "start" not in r])


def resnet20_default() -> str:
    """So too, and learned from second-order rounding: everything by default."""
    return _bits_by_placement([r for r in records("accuracy") if r.get("start") == "second-order"])


def _bits_by_placement(found: list[Record]) -> str:
    rows = []
    for bits in ("w4a4", "w2a4", "w2a2"):
        for placement in ("academic", "integer"):
            group = [r for r in found if (r["bits"], r["placement"]) == (bits, placement)]
            if group:
                authors = f"{AUTHORS[bits]:.2f}" if placement == "academic" else ""
                rows.append([*_row(group, [bits.upper(), placement]), authors])
    return markdown(["bits", "placement", *_COLUMNS, "authors' code"], rows)


def resnet20_long() -> str:
    """1 024 images, 2 000 iterations."""
    rows = []
    for bits in ("w4a4", "w2a4", "w2a2"):
        for placement in ("academic", "integer"):
            group = _accuracy("resnet20", bits=bits, placement=placement, num=1024, iterations=2000)
            if group:
                rows.append(_row(group, [bits.upper(), placement]))
    return markdown(["bits", "placement", *_COLUMNS], rows)


def resnet20_schedules() -> str:
    """Accuracy against iterations, the rates scaled with the schedule or as published."""
    found = [r for r in records("accuracy") if "lr_scale" in r]
    rows = []
    for steps in sorted({r["iterations"] for r in found}):
        by_rule = {
            rule: [r["onnxruntime"] for r in found if r["iterations"] == steps and r["lr_scale"] == rule]
            for rule in ("auto", 1)
        }
        rows.append([str(steps), *(spread(values) if values else "" for values in by_rule.values())])
    return markdown(["iterations", "rates scaled with the schedule", "published rates"], rows)


def mobilenet() -> str:
    """MobileNet-V1: W8A8 and W4A4."""
    rows = []
    for bits, method in (("w8a8", "nearest"), ("w4a4", "nearest"), ("w4a4", "genie")):
        group = _accuracy("mobilenet_v1_075", bits=bits, method=method)
        if group:
            rows.append(_row(group, [bits.upper(), method]))
    return markdown(["bits", "method", *_COLUMNS], rows)


def _older(record: Record) -> str:
    is_current = load_recipe(record["recipe"]).sha256().startswith(record["sha256"])
    return "" if is_current else " (before)"


def recipes() -> str:
    """Each shipped recipe as it stands, or as it stood where it was not measured since."""
    rows = [
        [f"`{r['recipe']}`{_older(r)}", str(r["num"]), *_row([r], [])[:-1], f"{r['seconds'] / 60:.1f}"]
        for r in records("recipes")
    ]
    return markdown(["recipe", "images", *_COLUMNS[:-1], "minutes"], rows)


def architectures() -> str:
    """The 16 torchvision networks, newest record of each."""
    newest = {r["model"]: r for r in records("architectures")}
    rows = []
    for name, r in newest.items():
        if not r["ok"]:
            rows.append([name, "failed", r["error"], "", "", ""])
            continue
        left = ", ".join(f"{count} {kind}" for kind, count in r["floating"].items()) or "none"
        rows.append(
            [
                name,
                str(r["blocks"]),
                f"{r['integer_nodes']} of {r['nodes']}",
                left,
                f"{100 * r['agreement']:.0f} %",
                f"{r['float_mb']} → {r['file_mb']} MB",
            ]
        )
    return markdown(["network", "blocks", "integer nodes", "left in float", "ORT = simulated", "size"], rows)


def kills() -> str:
    """Killed and resumed runs."""
    rows = [
        [
            f"{r['after_seconds']} s of {r['of_seconds']} s",
            str(r["blocks_kept"]),
            "yes" if r["identical"] else "NO",
        ]
        for r in records("kill_and_resume")
    ]
    return markdown(["killed after", "blocks kept", "identical after --resume"], rows)


def cost() -> str:
    """What the recorded runs took, by network and schedule."""
    groups: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
    for r in records("accuracy"):
        if r["method"] == "genie":
            groups[r["model"], r["num"], r["iterations"]].append(r)
    rows = []
    for (model, num, iterations), group in sorted(groups.items()):
        learned = [s for r in group for s in r["seconds_per_block"].values()]
        rows.append(
            [
                model,
                str(num),
                str(iterations),
                f"{min(learned):.1f} / {median(learned):.1f} / {max(learned):.1f}",
                f"{iterations / median(learned):.0f}",
                f"{median(r['seconds'] for r in group):.0f}",
                f"{max(r['peak_memory_mib'] for r in group):,}",
            ]
        )
    header = ["network", "images", "iterations", "s/block min / median / max", "iterations/s", "s/run", "MiB"]
    return markdown(header, rows)


def speed() -> str:
    """Seconds per block and steps per second."""
    rows = [
        [
            r["model"],
            r["block"],
            f"{r['steps_per_second']:.1f}",
            f"{r['against_float']:.1f}",
            f"{r['against_plain']:.2f}",
            f"{r['peak_memory_mib']}",
        ]
        for r in records("speed")
    ]
    header = ["network", "block", "steps/s", "step / float forward", "plain formulas / step", "peak MiB"]
    return markdown(header, rows)


def memory() -> str:
    """The allocator setting, side by side."""
    rows = [
        [r["block"], f"{r['seconds_default']:.2f}", f"{r['seconds_kept']:.2f}", f"{r['ratio']:.2f}"]
        for r in records("allocator")
    ]
    return markdown(["block", "default, s/step", "kept, s/step", "ratio"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "resnet20-w8a8": resnet20_w8a8,
    "resnet20-short": resnet20_short,
    "resnet20-stem": resnet20_stem,
    "resnet20-default": resnet20_default,
    "resnet20-long": resnet20_long,
    "resnet20-schedules": resnet20_schedules,
    "mobilenet": mobilenet,
    "starts": tables_starts.starts,
    "recipes": recipes,
    "architectures": architectures,
    "kills": kills,
    "cost": cost,
    "speed": speed,
    "memory": memory,
    "parity": tables_deployment.parity,
    "latency": tables_deployment.latency,
    "metaaug-main": tables_metaaug.main_table,
    "metaaug-images": tables_metaaug.images,
    "metaaug-published": tables_metaaug.published,
    "metaaug-default": tables_metaaug.by_default,
    "metaaug-kinds": tables_metaaug.fixed_kinds,
    "metaaug-released": tables_metaaug.as_released,
    "metaaug-ablation": tables_metaaug.ablation,
    "metaaug-terms": tables_metaaug.terms,
    "metaaug-mobilenet": tables_metaaug.mobilenet,
    "metaaug-speed": tables_metaaug.speed,
    "metaaug-runs": tables_metaaug.speed_of_runs,
    "metaaug-gpu": tables_metaaug.gpu,
    "data-free-resnet20": lambda: tables_calibration.data_free("resnet20"),
    "data-free-mobilenet-128": lambda: tables_calibration.data_free("mobilenet_v1_075 at 128 px"),
    "data-free-mobilenet": lambda: tables_calibration.data_free("mobilenet_v1_075"),
    "data-free-ablation": tables_calibration.data_free_ablation,
    "data-free-default-resnet20": lambda: tables_calibration.data_free_default("resnet20"),
    "data-free-default-mobilenet": lambda: tables_calibration.data_free_default("mobilenet_v1_075"),
    "data-free-default-128": lambda: tables_calibration.data_free_default("mobilenet_v1_075 at 128 px"),
    "data-free-default-ablation": tables_calibration.data_free_default_ablation,
    "data-free-cost": tables_calibration.data_free_cost,
    "calibration-check": tables_calibration.calibration_check,
    "duplicates": tables_calibration.duplicates,
}


def fill(text: str) -> str:
    """Replace every marked table."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match.group(1)} -->\n{TABLES[match.group(1)]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def picture() -> str:
    """Top-1 of ResNet-20 per bit-width as an SVG bar chart, `integer` placement, and float."""
    by_default = [
        r for r in records("accuracy") if r.get("start") == "second-order" and r["placement"] == "integer"
    ]
    rows = [("W8A8", _accuracy("resnet20", bits="w8a8", placement="integer", num=256))]
    rows += [(b.upper(), [r for r in by_default if r["bits"] == b]) for b in ("w4a4", "w2a4", "w2a2")]
    bars = [(label, mean(r["onnxruntime"] for r in group)) for label, group in rows if group]
    float_top1 = records("accuracy")[0]["float"]
    low, height, width = 60.0, 220, 90

    def y(value: float) -> float:
        return 30 + height * (1 - (value - low) / (95 - low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {70 + width * len(bars) + 20} {height + 85}" '
        'font-family="sans-serif" font-size="13" role="img" aria-label="Top-1 accuracy by bit-width">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<text x="12" y="18" fill="#24292f">ResNet-20, CIFAR-10 test: top-1 in ONNX Runtime, %</text>',
    ]
    right = 70 + width * len(bars)

    def label(x: float, at: float, text: object, anchor: str = "middle", fill: str = "#24292f") -> str:
        return f'<text x="{x}" y="{at:.1f}" text-anchor="{anchor}" fill="{fill}">{text}</text>'

    for tick in range(60, 96, 10):
        level = f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
        parts.append(f'<line x1="50" x2="{right}" {level} stroke="#d0d7de"/>')
        parts.append(label(44, y(tick) + 4, tick, "end"))
    for number, (bits, value) in enumerate(bars):
        x, top = 65 + width * number, y(value)
        parts.append(f'<rect x="{x}" y="{top:.1f}" width="60" height="{y(low) - top:.1f}" fill="#0969da"/>')
        parts.append(label(x + 30, top + 20, f"{value:.1f}", fill="#ffffff"))
        parts.append(label(x + 30, y(low) + 18, bits))
    parts.append(
        f'<line x1="50" x2="{70 + width * len(bars)}" y1="{y(float_top1):.1f}" y2="{y(float_top1):.1f}" '
        'stroke="#cf222e" stroke-dasharray="5 4"/>'
    )
    note = f"dashed: float {float_top1:.2f}; the axis starts at {low:.0f}"
    parts.append(f'<text x="12" y="{height + 72}" fill="#cf222e">{note}</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    """Rewrite the files and the picture."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        file.write_text(fill(text), encoding="utf-8")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
