"""``metaaug calibrate compare``: two sets side by side, as a model's batch norms see them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaaug_cli.cli.calibration_view import load_model_for, probe_of, read_set
from metaaug_cli.cli.console import Console
from metaaug_cli.cli.options import (
    DATA_PANEL,
    MODEL_PANEL,
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

_FARTHEST = 8

EPILOG = """\
[bold]Real against synthetic[/bold]
  metaaug calibrate compare calib.safetensors synthetic.safetensors \\
    --model resnet18

[bold]A folder[/bold] is drawn from and prepared for the model
  metaaug calibrate compare calib.safetensors ./new-camera --model resnet18"""

FirstArg = Annotated[
    Path, typer.Argument(metavar="A", help="A set or a folder of images.", show_default=False)
]
SecondArg = Annotated[
    Path, typer.Argument(metavar="B", help="The set or folder compared with A.", show_default=False)
]
ModelOpt = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The model whose batch norms look at the sets.",
        rich_help_panel=MODEL_PANEL,
    ),
]
NumOpt = Annotated[
    int,
    typer.Option(
        "--num", metavar="N", help="Images of each set to look at.", min=8, rich_help_panel=DATA_PANEL
    ),
]


def compare(
    first: FirstArg,
    second: SecondArg,
    model: ModelOpt,
    num: NumOpt = 256,
    seed: SeedOpt = 0,
    weights: WeightsOpt = None,
    size: SizeOpt = None,
    resize: ResizeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    interpolation: InterpolationOpt = None,
    json: JsonOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Measure how far two sets are apart in a model's own statistics.

    The distance is given beside its yardstick, the distance between two
    halves of A at the same number of images. It says whether the network
    sees a difference, and in which layers; it predicts no accuracy.
    """
    console = Console(quiet=quiet, json=json)
    options = model_options(
        weights=weights, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation
    )
    from metaaug_cli.calibration.compare import compare_sets

    stored = second if first.is_dir() and second.is_file() else first
    loaded = load_model_for(stored, model, options)
    a, b = (read_set(path, loaded.preprocessing, console, num=num, seed=seed) for path in (first, second))
    for path, calibration in ((first, a), (second, b)):
        differences = calibration.preprocessing.differences(loaded.preprocessing)
        if differences:
            console.warn(f"{path.name} was prepared for another model: {'; '.join(differences)}")
    if a.sha256 == b.sha256:
        console.warn("both sets hold the same images")
    probe = probe_of(loaded, a, "sets can only be compared by a model with batch norms")
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    with console.progress("running the model") as progress:
        found = compare_sets(a, b, probe, names=names, num=num, seed=seed, progress=progress)
    farthest = sorted(found.layers, key=lambda layer: -layer.distance)[:_FARTHEST]
    rows = [(layer.name, f"{layer.distance:.3f}", f"{layer.halves:.3f}") for layer in farthest]
    rows.append(("all layers", f"{found.distance:.3f}", f"{found.halves:.3f}"))
    console.table("farthest layers", ["batch norm", "A to B", "halves of A"], rows)
    console.result(found.sentence)
    console.result(
        f"to the model's training images: {names[0]} {found.first_to_stored:.3f},"
        f" {names[1]} {found.second_to_stored:.3f}"
    )
    console.result("distances in stored standard deviations; they say nothing about accuracy")
    console.data({"first": str(first), "second": str(second), "model": loaded.name, **found.to_dict()})
