"""The ``--bench`` of ``metaaug export``: size and latency of every form beside float."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metaaug_cli.cli.console import Console

if TYPE_CHECKING:
    from metaaug_cli.deployment.latency import Latency
    from metaaug_cli.runs.finished import Run


def run_bench(console: Console, run: Run) -> dict[str, Any]:
    """Time a run's forms on this machine and show them; returns the same as plain data."""
    from metaaug_cli.deployment.latency import measure_forms

    with console.progress("bench") as tick:
        found = measure_forms(run.float_module, run.deployed_module, run.input_size, progress=tick)
    _show(console, found)
    return {
        name: {"bytes": latency.size_bytes, "milliseconds": dict(latency.milliseconds)}
        for name, latency in found.items()
    }


def _show(console: Console, found: dict[str, Latency]) -> None:
    from metaaug_cli.deployment.latency import FLOAT, ROUNDS

    base = found[FLOAT]
    batches = list(base.milliseconds)
    columns = ["form", "size", "of float"]
    for batch in batches:
        columns += [f"batch {batch}\nms", "of float"]
    rows = []
    for name, latency in found.items():
        row = [name, f"{latency.size_bytes / 1e6:.2f} MB", f"{latency.size_bytes / base.size_bytes:.2f}"]
        for batch, time in latency.milliseconds.items():
            row += [f"{time:.2f}", f"{time / base.milliseconds[batch]:.2f}"]
        rows.append(row)
    console.table(f"One thread, medians of {ROUNDS} interleaved rounds", columns, rows)
