"""``metaaug calibrate MODEL --data-free``: its flags, the estimate shown before, and the run."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaaug_cli.cli.console import Console, format_seconds, resume_hint
from metaaug_cli.cli.options import require_device
from metaaug_cli.errors import UsageError

if TYPE_CHECKING:
    from metaaug_cli.calibration.data import CalibrationSet
    from metaaug_cli.networks.models import LoadedModel
    from metaaug_cli.synthesis.dgh import SynthesisSettings

PANEL = "Without images"
DEFAULT_NUM = 512
_STRETCHES = ("plain", "regularised", "off")
_STARTS = ("natural", "noise")

DataFreeOpt = Annotated[
    bool,
    typer.Option(
        "--data-free",
        help="Make images from the network's batch norms; --images is then a folder to write them to as PNG.",
        rich_help_panel=PANEL,
    ),
]
IterationsOpt = Annotated[
    int | None,
    typer.Option(
        "--iterations",
        metavar="N",
        min=1,
        help="Steps for each image, 150 if not set.",
        rich_help_panel=PANEL,
    ),
]
BatchOpt = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        help="Images in memory at a time, 32 if not set.",
        rich_help_panel=PANEL,
    ),
]
BesideOpt = Annotated[
    Path | None,
    typer.Option(
        "--beside",
        metavar="DIR|FILE",
        help="Your few real images, a folder or a set: they come first in the set, the made ones after them.",
        rich_help_panel=PANEL,
    ),
]
StretchOpt = Annotated[
    str | None,
    typer.Option(
        "--stretch",
        metavar="NAME",
        help="Spread of the logits: plain (the default), regularised or off.",
        rich_help_panel=PANEL,
    ),
]
StartOpt = Annotated[
    str | None,
    typer.Option(
        "--start",
        metavar="NAME",
        help="What the images are made from: natural (the default), noise that varies as photographs do in "
        "brightness, colour and contrast; or noise, every pixel on its own, as published.",
        rich_help_panel=PANEL,
    ),
]
NoWholeSetOpt = Annotated[
    bool,
    typer.Option(
        "--no-whole-set",
        help="Match the statistics of each batch alone, not those of all images together.",
        rich_help_panel=PANEL,
    ),
]
NoPreprocessingOpt = Annotated[
    bool,
    typer.Option(
        "--no-preprocessing",
        help="No random flips and crops and no smoothing while the images are made.",
        rich_help_panel=PANEL,
    ),
]
DeviceOpt = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.", rich_help_panel=PANEL),
]
ResumeOpt = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=PANEL)
]


def require_unused(flags: dict[str, Any]) -> None:
    """Refuse flags of this mode where ``--data-free`` is missing.

    Raises:
        UsageError: Naming them.
    """
    given = [name for name, value in flags.items() if value]
    if given:
        raise UsageError(
            f"{', '.join(given)}: for --data-free only", hint="add --data-free, or leave them out"
        )


def settings_from(flags: dict[str, Any], *, num: int | None, seed: int) -> SynthesisSettings:
    """The flags as settings; those not given keep the library's defaults.

    Raises:
        UsageError: A value that its flag does not take.
    """
    from metaaug_cli.synthesis.dgh import SynthesisSettings

    stretch = flags["--stretch"]
    if stretch is not None and stretch not in _STRETCHES:
        raise UsageError(f"--stretch {stretch} is unknown", hint=f"use one of: {', '.join(_STRETCHES)}")
    start = flags["--start"]
    if start is not None and start not in _STARTS:
        raise UsageError(f"--start {start} is unknown", hint=f"use one of: {', '.join(_STARTS)}")
    require_device(flags["--device"] or "auto")
    given = {
        "iterations": flags["--iterations"],
        "batch_size": flags["--batch"],
        "stretch": stretch,
        "start": start,
    }
    return SynthesisSettings(
        num=num or DEFAULT_NUM,
        seed=seed,
        whole_set=not flags["--no-whole-set"],
        preprocessing=not flags["--no-preprocessing"],
        **{key: value for key, value in given.items() if value is not None},
    )


def synthesize(
    console: Console,
    loaded: LoadedModel,
    settings: SynthesisSettings,
    out: Path,
    images: Path | None,
    real: CalibrationSet | None,
    flags: dict[str, Any],
) -> CalibrationSet:
    """Make the set, store it behind the ``real`` one, and write the made images as PNGs if asked for."""
    from metaaug_cli.calibration.data import join_calibration_sets, save_calibration_set
    from metaaug_cli.calibration.png_folder import require_empty, write_pngs
    from metaaug_cli.memory import keep_freed_memory
    from metaaug_cli.pipeline import pick_device
    from metaaug_cli.synthesis.dgh import SynthesisHistory, estimate_seconds, synthesize_calibration_set
    from metaaug_cli.synthesis.state import require_absent

    if images is not None:
        require_empty(images)
    device = pick_device(flags["--device"] or "auto")
    state = state_path(out)
    keep_freed_memory()
    if not flags["--resume"]:
        require_absent(state)
        seconds = estimate_seconds(loaded, settings, device=device)
        console.note(
            f"{settings.num} images, {settings.iterations} steps each on {device}: about "
            f"{format_seconds(seconds)}; fewer --iterations or --num take less"
        )
    again = [argument for argument in sys.argv[1:] if argument != "--resume"]

    def hint() -> str:
        if not state.exists():
            return f"nothing is kept yet; begin again with\nmetaaug {shlex.join(again)}"
        return f"continue with\nmetaaug {shlex.join([*again, '--resume'])}"

    history, started = SynthesisHistory(), time.monotonic()
    with resume_hint(hint), console.progress("making images") as tick:
        made = synthesize_calibration_set(
            loaded,
            settings,
            device=device,
            state_path=state,
            resume=flags["--resume"],
            tick=tick,
            history=history,
        )
    calibration = made if real is None else join_calibration_sets(real, made)
    save_calibration_set(calibration, out)
    if images is not None:
        write_pngs(made, images)
        console.result(f"{len(made.images)} PNG files written to {images}")
    state.unlink(missing_ok=True)
    if history.losses:
        console.note(
            f"BN loss {history.losses[0]:.3g} -> {history.losses[-1]:.3g} "
            f"in {format_seconds(time.monotonic() - started)}"
        )
    return calibration


def state_path(out: Path) -> Path:
    """Where an unfinished run of ``out`` keeps its state."""
    return out.with_name(f"{out.name}.partial")
