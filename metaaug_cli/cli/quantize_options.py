"""The flags of ``metaaug quantize``: names, help and ranges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from metaaug_cli.cli.options import DATA_PANEL

METHOD_PANEL = "Method"
RUN_PANEL = "Run"

CalibOpt = Annotated[
    Path,
    typer.Option(
        "--calib",
        metavar="DIR|FILE",
        help="Calibration images: a folder, or a set built by `metaaug calibrate`.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
NumOpt = Annotated[
    int | None,
    typer.Option(
        "--num", metavar="N", min=1, help="Images to draw, 1024 if not set.", rich_help_panel=DATA_PANEL
    ),
]
HoldoutOpt = Annotated[
    int | None,
    typer.Option(
        "--holdout",
        metavar="N",
        min=0,
        help="Of them, images to learn nothing from, to measure how far the blocks overfit the others.",
        rich_help_panel=DATA_PANEL,
    ),
]
SyntheticOpt = Annotated[
    int | None,
    typer.Option(
        "--synthetic",
        metavar="N",
        min=0,
        help="Beside them, images to make from the network's batch norms: for sets of few images.",
        rich_help_panel=DATA_PANEL,
    ),
]
OutOpt = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Run directory; default runs/MODEL-wWaA.", rich_help_panel=RUN_PANEL
    ),
]
RecipeOpt = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="w8a8, w4a4, w2a4, w2a2; the last three with -metaaug or -metaaug-fast for copies that are "
        "learned, w4a4 and w2a4 with -gptq for seconds; few-shot-32, few-shot-32-synthetic; or a YAML file.",
        rich_help_panel=METHOD_PANEL,
    ),
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any other recipe field; repeatable.",
        rich_help_panel=METHOD_PANEL,
    ),
]
WBitsOpt = Annotated[
    int | None,
    typer.Option("--wbits", metavar="2..8", help="Weight bits, 4 if not set.", rich_help_panel=METHOD_PANEL),
]
ABitsOpt = Annotated[
    int | None,
    typer.Option(
        "--abits", metavar="2..8", help="Activation bits, 4 if not set.", rich_help_panel=METHOD_PANEL
    ),
]
MethodOpt = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="genie, qdrop, brecq, adaround; or gptq (seconds) and nearest, which learn nothing.",
        rich_help_panel=METHOD_PANEL,
    ),
]
PlacementOpt = Annotated[
    str | None,
    typer.Option(
        "--placement",
        metavar="NAME",
        help="integer (every tensor, the default), full (every tensor and layer at the chosen bits) or "
        "academic (as in papers).",
        rich_help_panel=METHOD_PANEL,
    ),
]
AugmentOpt = Annotated[
    str | None,
    typer.Option(
        "--augment",
        metavar="KIND",
        help="Learn on changed copies too, meant for few images: none, metaaug (learned), auto (the default: "
        "metaaug at 2 bits on real images alone), or joined by + (also after metaaug+) flip, crop, rotate, "
        "geometric, brightness, contrast, photometric, mixup, cutmix, and trivial or rand, whole or as "
        "-geometric, -photometric.",
        rich_help_panel=METHOD_PANEL,
    ),
]
IterationsOpt = Annotated[
    int | None,
    typer.Option("--iterations", metavar="N", help="Steps per block.", rich_help_panel=METHOD_PANEL),
]
BatchOpt = Annotated[
    int | None, typer.Option("--batch", metavar="N", help="Images per step.", rich_help_panel=METHOD_PANEL)
]
SeedOpt = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="N", help="Seed of every random choice, 0 if not set.", rich_help_panel=METHOD_PANEL
    ),
]
DeviceOpt = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.", rich_help_panel=RUN_PANEL)
]


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number of GiB")
    return value


CacheOpt = Annotated[
    float | None,
    typer.Option(
        "--cache-gb",
        metavar="GIB",
        min=0,
        callback=_finite,
        help="Activations to keep; default half of the free memory. Beyond it they are recomputed.",
        rich_help_panel=RUN_PANEL,
    ),
]
ResumeOpt = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=RUN_PANEL)
]
PlanOpt = Annotated[
    bool,
    typer.Option(
        "--plan", help="Show blocks, bits, memory and time; quantize nothing.", rich_help_panel=RUN_PANEL
    ),
]
