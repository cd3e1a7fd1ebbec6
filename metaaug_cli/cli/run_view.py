"""What ``metaaug quantize`` shows when a run is done."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from metaaug_cli.cli.console import Console

if TYPE_CHECKING:
    from metaaug_cli.pipeline import QuantizedModel
    from metaaug_cli.quantization.reconstruct import BlockHistory
    from metaaug_cli.recipe.config import Recipe


def show_result(console: Console, recipe: Recipe, result: QuantizedModel, run_dir: Path) -> None:
    """Print the error of each block, the agreement and what comes next, and give them as data."""
    from metaaug_cli.prepare import method_label

    q = recipe.quantization
    columns = _columns(result.histories)
    console.table(
        f"W{q.weight_bits}A{q.act_bits} {method_label(recipe)}, {q.placement} placement: "
        "error of each block against float",
        ["block", *columns],
        [
            (block.name, *(None if value is None else f"{value:.4g}" for value in values))
            for block, *values in zip(result.chain.blocks, *columns.values(), strict=True)
        ],
    )
    agreement = result.metrics["calibration_agreement"]
    console.result(
        f"top-1 agreement with float on {result.metrics['calibration_agreement_images']} calibration images: "
        f"{100 * agreement:.1f} % (images it was fitted on; measure on others with evaluate)"
    )
    console.result(f"run directory: {run_dir}")
    _point_to_page(console, run_dir)
    typed = shlex.quote(str(run_dir))
    console.note(f"next: metaaug evaluate {typed} --data DIR\n      metaaug export {typed} -o model.onnx")
    console.data({"run": str(run_dir), **result.metrics})


def _columns(histories: list[BlockHistory]) -> dict[str, list[float | None]]:
    """Values of each block by column; those of learning, held-back images and an augmenter if any."""
    columns: dict[str, list[float | None]] = {
        "before": [h.loss_before for h in histories],
        "after": [h.loss_after for h in histories],
    }
    if columns["before"] == columns["after"]:  # nothing was learned
        columns = {"error": columns["after"]}
    extra: dict[str, list[float | None]] = {
        "held back": [h.losses.get("held_back") for h in histories],
        "T's distance": [h.augmentation.get("distance") for h in histories],
    }
    return columns | {title: values for title, values in extra.items() if any(v is not None for v in values)}


def _point_to_page(console: Console, run_dir: Path) -> None:
    from metaaug_cli.runs.artifacts import AUGMENTATION
    from metaaug_cli.runs.augmentation_files import PAGE

    page = run_dir / AUGMENTATION / PAGE
    if page.exists():
        console.note(f"what the augmenter did: {page}")
