"""``metaaug calibrate``: build a calibration set once, and look at what is in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from metaaug_cli.cli.console import Console
from metaaug_cli.cli.options import (
    DATA_PANEL,
    OUTPUT_PANEL,
    InterpolationOpt,
    JsonOpt,
    MeanOpt,
    ModelArg,
    QuietOpt,
    ResizeOpt,
    SeedOpt,
    SizeOpt,
    StdOpt,
    WeightsOpt,
    model_options,
)
from metaaug_cli.errors import UsageError

if TYPE_CHECKING:
    from metaaug_cli.data import CalibrationSet
    from metaaug_cli.inspection import ChannelStatistics

_LISTED = 5

EPILOG = """\
[bold]Build a set once, use it for every recipe[/bold]
  metaaug calibrate resnet18 --images ./imgs --out calib.safetensors
  metaaug quantize  resnet18 --calib calib.safetensors --wbits 4 --abits 4

[bold]Look at it[/bold]: a table here, a contact sheet in one HTML page
  metaaug calibrate inspect calib.safetensors --html calib.html

[bold]Your own network[/bold] says how its images are prepared
  metaaug calibrate net.py:build --weights net.safetensors --size 32 \\
    --mean .4914,.4822,.4465 --std .2470,.2435,.2616 \\
    --images ./imgs --out calib.safetensors"""

ImagesOpt = Annotated[
    Path,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of images, flat or one folder per class, any depth.",
        rich_help_panel=DATA_PANEL,
    ),
]
NumOpt = Annotated[
    int,
    typer.Option(
        "--num", metavar="N", help="Images to draw, balanced over classes.", min=1, rich_help_panel=DATA_PANEL
    ),
]
KeepDuplicatesOpt = Annotated[
    bool,
    typer.Option(
        "--keep-duplicates",
        help="Do not replace copies of an image drawn before by other images.",
        rich_help_panel=DATA_PANEL,
    ),
]
OutOpt = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="FILE", help="The .safetensors file to write.", rich_help_panel=OUTPUT_PANEL
    ),
]
HtmlOpt = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Page with contact sheet and histograms; beside FILE when neither it nor --png is named.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
PngOpt = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="The contact sheet alone.", rich_help_panel=OUTPUT_PANEL),
]
SetArg = Annotated[
    Path, typer.Argument(metavar="FILE", help="A set that calibrate built.", show_default=False)
]


class _BuildByDefault(TyperGroup):
    """A group in which ``calibrate MODEL ...`` means ``calibrate build MODEL ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["build", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the command group to the application."""
    group = typer.Typer(cls=_BuildByDefault, no_args_is_help=True, rich_markup_mode="rich")
    group.callback(epilog=EPILOG)(calibrate)
    group.command("build", epilog=EPILOG)(build)
    group.command("inspect")(inspect)
    app.add_typer(group, name="calibrate")


def calibrate() -> None:
    """Build calibration sets and look at them.

    metaaug calibrate MODEL ... is short for metaaug calibrate build MODEL ...
    """


def build(
    model: ModelArg,
    images: ImagesOpt,
    out: OutOpt,
    num: NumOpt = 1024,
    seed: SeedOpt = 0,
    keep_duplicates: KeepDuplicatesOpt = False,
    weights: WeightsOpt = None,
    size: SizeOpt = None,
    resize: ResizeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    interpolation: InterpolationOpt = None,
    json: JsonOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Draw images from a folder and store them, prepared for MODEL, in one file.

    The draw is seeded and balanced over the class folders. Files that cannot
    be read and copies of images drawn before are named and replaced by
    others; images of unusual exposure, colour or size are named. The file
    carries its preprocessing and a content hash, so it cannot be used for a
    model that prepares images differently.
    """
    console = Console(quiet=quiet, json=json)
    _require_suffix(out, ".safetensors", "--out")
    options = model_options(
        weights=weights, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation
    )
    from metaaug_cli.data import build_calibration_set, save_calibration_set, scan_folder
    from metaaug_cli.models import load_model

    folder = scan_folder(images)
    loaded = load_model(model, **options)
    console.note(f"{loaded.name}: {loaded.preprocessing.describe()}")
    with console.progress("preparing images") as progress:
        calibration = build_calibration_set(
            folder,
            loaded.preprocessing,
            num=num,
            seed=seed,
            keep_duplicates=keep_duplicates,
            progress=progress,
        )
    save_calibration_set(calibration, out)
    _warn_about(calibration, console, wanted=num)
    console.result(f"{len(calibration.images)} images written to {out}")
    console.note(f"metaaug calibrate inspect {out} shows them")
    console.data(_facts(calibration) | {"path": str(out), "model": loaded.name, "seed": seed})


def inspect(
    file: SetArg,
    html: HtmlOpt = None,
    png: PngOpt = None,
    json: JsonOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Show a calibration set: statistics here, a contact sheet in an HTML page."""
    console = Console(quiet=quiet, json=json)
    if html is None and png is None:
        html = file.with_suffix(".html")
    if html is not None:
        _require_suffix(html, ".html", "--html")
    if png is not None:
        _require_suffix(png, ".png", "--png")
    from metaaug_cli import inspection
    from metaaug_cli.data import load_calibration_set

    calibration = load_calibration_set(file, num=sys.maxsize)
    channels = inspection.channel_statistics(calibration)
    _show(calibration, channels, console, name=file.name)
    if html is not None:
        inspection.write_page(calibration, html, title=file.name)
        console.result(f"contact sheet and histograms: {html}")
    if png is not None:
        inspection.write_contact_sheet(calibration, png)
        console.result(f"contact sheet: {png}")
    console.data(inspection.summary(calibration))


def _show(
    calibration: CalibrationSet, channels: tuple[ChannelStatistics, ...], console: Console, *, name: str
) -> None:
    rows = [
        (
            channel.name,
            f"{channel.mean:.1f}",
            f"{channel.std:.1f}",
            f"{channel.low:.0f}-{channel.high:.0f}",
            f"{channel.black:.2%}",
            f"{channel.white:.2%}",
            f"{channel.normalised_mean:+.3f}",
            f"{channel.normalised_std:.3f}",
        )
        for channel in channels
    ]
    facts = _facts(calibration)
    classes = f", {facts['num_classes']} classes" if facts["num_classes"] else ""
    title = f"{name}: {facts['num']} images{classes}, {calibration.origin}"
    columns = ["channel", "mean", "std", "range", "black", "white", "mean'", "std'"]
    console.table(title, columns, rows)
    console.result("pixels on the 0 to 255 scale; ' marks what the network is given")
    console.result(calibration.preprocessing.describe())
    console.result(f"sha256 {calibration.sha256}")
    _warn_about(calibration, console)


def _facts(calibration: CalibrationSet) -> dict[str, Any]:
    from metaaug_cli.inspection import class_counts

    return {
        "num": len(calibration.images),
        "num_classes": len(class_counts(calibration)),
        "origin": calibration.origin,
        "preprocessing": calibration.preprocessing.to_dict(),
        "sha256": calibration.sha256,
        "skipped": list(calibration.skipped),
        "duplicates": list(calibration.duplicates),
        "outliers": list(calibration.outliers),
    }


def _warn_about(calibration: CalibrationSet, console: Console, *, wanted: int = 0) -> None:
    """Name what was skipped or stands out, and say when there are fewer images than asked for."""
    if calibration.skipped:
        console.warn(_listed("files skipped", calibration.skipped))
    if calibration.duplicates:
        console.note(_listed("copies left out", calibration.duplicates))
    if calibration.outliers:
        console.note(_listed("images stand out (they are kept)", calibration.outliers))
    if len(calibration.images) < wanted:
        console.note(f"{wanted} images were asked for, the folder has {len(calibration.images)}")


def _listed(what: str, items: Sequence[str]) -> str:
    more = f"\nand {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)} {what}:\n" + "\n".join(items[:_LISTED]) + more


def _require_suffix(path: Path, suffix: str, flag: str) -> None:
    if path.suffix.lower() != suffix:
        raise UsageError(f"{flag} {path} must end in {suffix}", hint=f"{flag} {path.with_suffix(suffix)}")
