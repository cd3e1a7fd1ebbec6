"""Tables about the exported file: parity with ONNX Runtime, its size and its latency."""

from __future__ import annotations

from tables_common import markdown, records

_FORMS = ("int8", "packed", "native")


def parity() -> str:
    """Both gates on all test images, and the size of each packing against float."""
    rows = []
    for r in records("parity"):
        sizes = [f"{r['float_bytes'] / r['bytes'][form]:.1f}×" for form in _FORMS]
        rows.append(
            [
                r["model"],
                r["bits"].upper(),
                f"{r['images']:,}",
                f"{r['codes'] / 1e9:.2f} · 10⁹",
                str(r["reference_mismatches"]),
                str(r["forced_mismatches"]),
                str(r["free_mismatches"]),
                f"{100 * r['top1_agreement']:.2f} %",
                f"{r['integer_nodes']} of {r['nodes']}",
                *sizes,
            ]
        )
    header = ["network", "bits", "images", "codes", "gate A", "gate B, forced", "gate B, free", "top-1"]
    return markdown([*header, "integer nodes", *(f"float / {form}" for form in _FORMS)], rows)


def latency() -> str:
    """Milliseconds of every form at batch 1 and 8, and their ratio to float."""
    rows = []
    for r in records("latency"):
        times = [f"{r['milliseconds'][b]:.1f} ms ({r['of_float'][b]:.2f})" for b in ("1", "8")]
        rows.append([r["bits"].upper(), r["form"], f"{r['bytes'] / 1e6:.1f} MB", *times])
    return markdown(["bits", "form", "file", "batch 1 (of float)", "batch 8 (of float)"], rows)
