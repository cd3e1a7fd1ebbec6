"""``metaaug calibrate``: build a calibration set once, look at it, and compare it with others."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from metaaug_cli.cli import calibrate_compare, calibrate_inspect
from metaaug_cli.cli import data_free as free
from metaaug_cli.cli.calibration_view import facts, require_output, warn_about
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
    from metaaug_cli.calibration.data import CalibrationSet, ImageFolder
    from metaaug_cli.networks.models import LoadedModel

_DEFAULT_NUM = 1024

EPILOG = """\
[bold]Build a set once, use it for every recipe[/bold]
  metaaug calibrate resnet18 --images ./imgs --out calib.safetensors
  metaaug quantize  resnet18 --calib calib.safetensors --wbits 4 --abits 4

[bold]No images?[/bold] A network with batch norms remembers enough to make some
  metaaug calibrate resnet18 --data-free --num 512 --out synthetic.safetensors
  metaaug quantize  resnet18 --calib synthetic.safetensors --wbits 4 --abits 4

[bold]Too few images?[/bold] Made ones beside them keep the blocks from learning the few by heart
  metaaug calibrate resnet18 --data-free --num 256 --beside ./imgs --out mixed.safetensors

[bold]Look at it[/bold]: a verdict here, pictures in one HTML page
  metaaug calibrate inspect calib.safetensors --model resnet18

[bold]Your own network[/bold] says how its images are prepared
  metaaug calibrate net.py:build --weights net.safetensors --size 32 \\
    --mean .4914,.4822,.4465 --std .2470,.2435,.2616 \\
    --images ./imgs --out calib.safetensors"""

ImagesOpt = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of images, flat or one folder per class, any depth.",
        rich_help_panel=DATA_PANEL,
    ),
]
NumOpt = Annotated[
    int | None,
    typer.Option(
        "--num",
        metavar="N",
        help="Images to draw, balanced over classes, 1024 if not set; images to make with --data-free, 512.",
        min=1,
        rich_help_panel=DATA_PANEL,
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
    group.command("inspect", epilog=calibrate_inspect.EPILOG)(calibrate_inspect.inspect)
    group.command("compare", epilog=calibrate_compare.EPILOG)(calibrate_compare.compare)
    app.add_typer(group, name="calibrate")


def calibrate() -> None:
    """Build calibration sets, look at them and compare them.

    metaaug calibrate MODEL ... is short for metaaug calibrate build MODEL ...
    """


def build(
    model: ModelArg,
    out: OutOpt,
    images: ImagesOpt = None,
    num: NumOpt = None,
    seed: SeedOpt = 0,
    keep_duplicates: KeepDuplicatesOpt = False,
    weights: WeightsOpt = None,
    size: SizeOpt = None,
    resize: ResizeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    interpolation: InterpolationOpt = None,
    data_free: free.DataFreeOpt = False,
    beside: free.BesideOpt = None,
    iterations: free.IterationsOpt = None,
    batch: free.BatchOpt = None,
    start: free.StartOpt = None,
    stretch: free.StretchOpt = None,
    no_whole_set: free.NoWholeSetOpt = False,
    no_preprocessing: free.NoPreprocessingOpt = False,
    device: free.DeviceOpt = None,
    resume: free.ResumeOpt = False,
    json: JsonOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Draw images from a folder and store them, prepared for MODEL, in one file.

    The draw is seeded and balanced over the class folders. Files that cannot
    be read and copies of images drawn before are named and replaced by
    others; images of unusual exposure, colour or size are named. The first
    five of each are shown, --json has all. The file carries its
    preprocessing and a content hash, so it cannot be used for a model that
    prepares images differently.

    With --data-free no images are needed: they are made from what the
    network's batch norms remember of its training images. With --beside your
    own few images come first in the set.
    """
    console = Console(quiet=quiet, json=json)
    require_output(out, ".safetensors", "--out")
    options = model_options(
        weights=weights, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation
    )
    flags = {
        "--beside": beside,
        "--iterations": iterations,
        "--batch": batch,
        "--stretch": stretch,
        "--start": start,
        "--no-whole-set": no_whole_set,
        "--no-preprocessing": no_preprocessing,
        "--device": device,
        "--resume": resume,
    }
    if not data_free:
        free.require_unused(flags)
    elif keep_duplicates:
        raise UsageError("--keep-duplicates and --data-free exclude each other", hint="leave one out")
    settings = free.settings_from(flags, num=num, seed=seed) if data_free else None
    from metaaug_cli.calibration.data import scan_folder
    from metaaug_cli.networks.models import load_model

    folder = None if settings else scan_folder(_required(images))
    loaded = load_model(model, **options)
    console.note(f"{loaded.name}: {loaded.preprocessing.describe()}")
    if settings is not None:
        real = _real_images(console, beside, loaded, seed)
        calibration = free.synthesize(console, loaded, settings, out, images, real, flags)
    else:
        assert folder is not None
        calibration = _draw(console, folder, loaded, out, num or _DEFAULT_NUM, seed, keep_duplicates)
    console.result(f"{len(calibration.images)} images written to {out}")
    console.note(f"metaaug calibrate inspect {shlex.quote(str(out))} shows them")
    console.data(facts(calibration) | {"path": str(out), "model": loaded.name, "seed": seed})


def _required(images: Path | None) -> Path:
    if images is None:
        raise UsageError("no images to draw from", hint="pass --images DIR; without any, --data-free")
    return images


def _real_images(
    console: Console, path: Path | None, loaded: LoadedModel, seed: int
) -> CalibrationSet | None:
    """What ``--beside`` names, prepared for the model."""
    if path is None:
        return None
    from metaaug_cli.calibration.data import load_calibration_set

    with console.progress("reading images") as progress:
        real = load_calibration_set(
            path, preprocessing=loaded.preprocessing, num=_DEFAULT_NUM, seed=seed, progress=progress
        )
    warn_about(real, console)
    console.note(f"{len(real.images)} real images from {real.origin}")
    return real


def _draw(
    console: Console,
    folder: ImageFolder,
    loaded: LoadedModel,
    out: Path,
    num: int,
    seed: int,
    keep_duplicates: bool,
) -> CalibrationSet:
    from metaaug_cli.calibration.data import build_calibration_set, save_calibration_set

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
    warn_about(calibration, console, wanted=num)
    return calibration
