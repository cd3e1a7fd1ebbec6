"""``metaaug calibrate inspect``: what a set holds, and whether it suits a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaaug_cli.cli.calibration_view import load_model_for, probe_of, read_set, require_output, show
from metaaug_cli.cli.console import Console
from metaaug_cli.cli.options import (
    DATA_PANEL,
    MODEL_PANEL,
    OUTPUT_PANEL,
    InterpolationOpt,
    JsonOpt,
    MeanOpt,
    QuietOpt,
    ResizeOpt,
    SeedOpt,
    SizeOpt,
    StdOpt,
    WeightsOpt,
    model_options,
)
from metaaug_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from metaaug_cli.calibration.check import Check
    from metaaug_cli.calibration.data import CalibrationSet
    from metaaug_cli.networks.models import LoadedModel

_FARTHEST = 5

EPILOG = """\
[bold]Does this set suit my model?[/bold]
  metaaug calibrate inspect calib.safetensors --model resnet18
  metaaug calibrate inspect ./imgs --model net.py:build --weights net.pt \\
    --size 32 --mean .5,.5,.5 --std .5,.5,.5

[bold]In a script[/bold]: exit code 1 where it does not
  metaaug calibrate inspect calib.safetensors --model resnet18 --strict"""

SetArg = Annotated[
    Path,
    typer.Argument(
        metavar="SET", help="A set that calibrate built, or a folder of images.", show_default=False
    ),
]
ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Say whether the set suits this model; needed for a folder.",
        rich_help_panel=MODEL_PANEL,
    ),
]
NumOpt = Annotated[
    int,
    typer.Option(
        "--num",
        metavar="N",
        help="Images to run through the model, and to draw from a folder.",
        min=2,
        rich_help_panel=DATA_PANEL,
    ),
]
HtmlOpt = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Page with the verdict, contact sheet and histograms; beside SET when neither it nor --png"
        " is named.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
PngOpt = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="The contact sheet alone.", rich_help_panel=OUTPUT_PANEL),
]
StrictOpt = Annotated[
    bool,
    typer.Option(
        "--strict", help="Exit with 1 if the set does not suit the model.", rich_help_panel=OUTPUT_PANEL
    ),
]


def inspect(
    file: SetArg,
    model: ModelOpt = None,
    num: NumOpt = 256,
    seed: SeedOpt = 0,
    weights: WeightsOpt = None,
    size: SizeOpt = None,
    resize: ResizeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    interpolation: InterpolationOpt = None,
    html: HtmlOpt = None,
    png: PngOpt = None,
    strict: StrictOpt = False,
    json: JsonOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Show a set: statistics here, pictures in an HTML page, and a verdict.

    With --model, what the network's batch norms see of the images is compared
    with what they stored while it was trained. One sentence says whether the
    set suits the model; swapped channels, a wrong normalisation, grey images,
    another kind of images and too few classes are named where they are seen.
    The exit code is 0 either way, or 1 for an unsuitable set with --strict.
    """
    console = Console(quiet=quiet, json=json)
    html = _outputs(file, html, png)
    options = model_options(
        weights=weights, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation
    )
    if model is None and (strict or options):
        flag = "--strict" if strict else f"--{next(iter(options))}"
        raise UsageError(f"{flag} needs a model", hint="add --model MODEL")
    from metaaug_cli.calibration import inspection

    loaded = load_model_for(file, model, options) if model is not None else None
    preprocessing = loaded.preprocessing if loaded is not None else None
    calibration = read_set(file, preprocessing, console, num=num, seed=seed)
    check = _check(calibration, loaded, console, num) if loaded is not None else None
    channels = inspection.channel_statistics(calibration)
    show(calibration, channels, console, name=file.name)
    if check is not None:
        _show_check(check, console)
    if html is not None:
        inspection.write_page(calibration, channels, html, title=file.name, check=check)
        console.result(f"contact sheet and histograms: {html}")
    if png is not None:
        inspection.write_contact_sheet(calibration, png)
        console.result(f"contact sheet: {png}")
    report = inspection.summary(calibration, channels)
    console.data(report | ({"check": check.to_dict()} if check is not None else {}))
    if strict and check is not None and not check.suits:
        raise GateError("the set does not suit the model", hint=check.findings[0].remedy)


def _outputs(file: Path, html: Path | None, png: Path | None) -> Path | None:
    """Where the page goes, if anywhere; wrong names are refused before any work."""
    if png is not None:
        require_output(png, ".png", "--png")
    if html is None and png is None:
        html = file.with_name(f"{file.name}.html") if file.is_dir() else file.with_suffix(".html")
    if html is not None:
        require_output(html, ".html", "--html")
    return html


def _check(calibration: CalibrationSet, loaded: LoadedModel, console: Console, num: int) -> Check:
    from metaaug_cli.calibration.check import check_calibration_set

    probe = probe_of(loaded, calibration, "leave --model out: the pictures and histograms need none")
    with console.progress("running the model") as progress:
        return check_calibration_set(
            calibration, probe, model=loaded.name, expected=loaded.preprocessing, num=num, progress=progress
        )


def _show_check(check: Check, console: Console) -> None:
    farthest = sorted(check.layers, key=lambda layer: -layer.distance)[:_FARTHEST]
    rows = [(layer.name, f"{layer.distance:.3f}") for layer in farthest]
    console.table("farthest from the training images", ["batch norm", "distance"], rows, detail=True)
    console.verdict(check.suits, check.sentence)
    for line in check.advice:
        console.result(f"- {line}")
