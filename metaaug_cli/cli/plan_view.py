"""What ``metaaug quantize --plan`` shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from metaaug_cli.cli.console import Console, format_seconds

if TYPE_CHECKING:
    from metaaug_cli.calibration.data import CalibrationSet
    from metaaug_cli.networks.models import LoadedModel
    from metaaug_cli.planning import PlanRow, TeachingPlan
    from metaaug_cli.recipe.config import Recipe


def show_plan(
    console: Console, loaded: LoadedModel, calibration: CalibrationSet, recipe: Recipe, device: str
) -> None:
    """Print the blocks of a run, their bits, memory and time, and give them as data."""
    from metaaug_cli.pipeline import pick_device
    from metaaug_cli.planning import plan_run
    from metaaug_cli.prepare import copies_of, method_label, prepare_chain, schedule_of

    made = recipe.calibration.synthetic
    images = len(calibration.images) + made
    chain = prepare_chain(loaded.module, tuple(calibration.images.shape[1:]), recipe)
    rows = plan_run(
        chain,
        schedule_of(recipe),
        images=images,
        device=pick_device(device),
        copies=copies_of(recipe, images) * images,
        teaching=_teaching(calibration, recipe),
    )
    title = f"Plan: {method_label(recipe)}, {recipe.quantization.placement} placement, {images} images"
    _show_blocks(console, title, rows)
    augmenter = sum(r.augmenter_seconds or 0 for r in rows)
    total = augmenter + sum(r.seconds or 0 for r in rows)
    peak = max(r.cache_bytes for r in rows) / 2**20
    learning = f"about {format_seconds(total)} of learning" if total else "nothing is learned"
    console.result(
        f"{len(rows)} blocks, {sum(r.parameters for r in rows):,} parameters, "
        f"largest cache {peak:.0f} MiB, {learning}"
    )
    if augmenter:
        m = recipe.metaaug
        console.result(
            f"learned augmenter: {m.form}, {m.steps} steps for each block but the first and last, about "
            f"{format_seconds(augmenter)} of that ({augmenter / total:.0%})"
            + (f", and {m.warmup_steps} steps of warm-up" if m.form == "unet" else "")
        )
    synthesis = _synthesis_seconds(loaded, recipe, device)
    if synthesis:
        console.result(
            f"{made} of the images are made from the network first: about {format_seconds(synthesis)}, once"
        )
    console.data(
        {
            "blocks": [asdict(r) for r in rows],
            "seconds": total,
            "synthesis_seconds": synthesis,
            "recipe": recipe.model_dump(mode="json"),
        }
    )


def _show_blocks(console: Console, title: str, rows: list[PlanRow]) -> None:
    console.table(
        title,
        ["block", "layers", "params", "W", "A", "MMAC", "cache MiB", "time"],
        [
            (
                r.block,
                r.layers,
                f"{r.parameters:,}",
                _bits(r.weight_bits),
                _bits(r.act_bits),
                f"{r.macs / 1e6:.1f}",
                f"{r.cache_bytes / 2**20:.1f}",
                "-" if r.seconds is None else format_seconds(r.seconds + (r.augmenter_seconds or 0.0)),
            )
            for r in rows
        ],
    )


def _synthesis_seconds(loaded: LoadedModel, recipe: Recipe, device: str) -> float:
    """What making the recipe's synthetic images takes; 0 for none, and where they are kept from before."""
    from metaaug_cli.learning_images import synthesis_of
    from metaaug_cli.pipeline import pick_device
    from metaaug_cli.synthesis.cache import is_cached
    from metaaug_cli.synthesis.dgh import estimate_seconds

    settings, chosen = synthesis_of(recipe), pick_device(device)
    if settings is None or is_cached(loaded, settings, device=chosen):
        return 0.0
    return estimate_seconds(loaded, settings, device=chosen)


def _teaching(calibration: CalibrationSet, recipe: Recipe) -> TeachingPlan | None:
    from metaaug_cli.planning import TeachingPlan
    from metaaug_cli.prepare import augmenter_of, learns_augmenter, meta_schedule_of

    if not learns_augmenter(recipe):
        return None
    return TeachingPlan(augmenter_of(recipe), meta_schedule_of(recipe), calibration.preprocessing)


def _bits(values: tuple[int, ...]) -> str:
    return "/".join(map(str, values)) or "-"
