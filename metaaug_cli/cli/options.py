"""Options that several commands share, so that a flag means the same thing everywhere."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metaaug_cli.errors import UsageError

MODEL_PANEL = "Model and preprocessing"
DATA_PANEL = "Data"
OUTPUT_PANEL = "Output"

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision name (resnet18), timm:NAME, FILE.py:FACTORY, or a torch.export FILE.pt2.",
        show_default=False,
    ),
]
WeightsOpt = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights: .safetensors, .pt or .pth (loaded without executing code).",
        rich_help_panel=MODEL_PANEL,
    ),
]
SizeOpt = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="N",
        help="Input size in pixels: N, or HEIGHTxWIDTH.",
        rich_help_panel=MODEL_PANEL,
    ),
]
ResizeOpt = Annotated[
    str | None,
    typer.Option(
        "--resize",
        metavar="N",
        help="Short side before the centre crop: pixels, none or auto.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MeanOpt = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="R,G,B",
        help="Mean per channel, for pixels in 0..1.",
        rich_help_panel=MODEL_PANEL,
    ),
]
StdOpt = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="R,G,B",
        help="Standard deviation per channel, for pixels in 0..1.",
        rich_help_panel=MODEL_PANEL,
    ),
]
InterpolationOpt = Annotated[
    str | None,
    typer.Option(
        "--interpolation",
        metavar="NAME",
        help="bilinear, bicubic or nearest.",
        rich_help_panel=MODEL_PANEL,
    ),
]
ClassesOpt = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        metavar="FILE",
        help="Class folder names in index order, one a line; needed when not every class has a folder.",
        rich_help_panel=DATA_PANEL,
    ),
]
SeedOpt = Annotated[
    int,
    typer.Option("--seed", help="Seed of every random choice.", show_default=True, min=0, max=2**63 - 1),
]
QuietOpt = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Results, warnings and errors only.", rich_help_panel=OUTPUT_PANEL),
]
JsonOpt = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE.json]",
        help="JSON on stdout (tables move to stderr), or into a file when one is named.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


def model_options(
    *,
    weights: Path | None = None,
    size: str | None = None,
    resize: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    interpolation: str | None = None,
) -> dict[str, Any]:
    """Parse the model flags into keyword arguments of ``models.load_model``; flags not given are left out.

    Raises:
        UsageError: A value that does not read as what the flag takes.
    """
    options: dict[str, Any] = {}
    if weights is not None:
        options["weights"] = weights if str(weights) != "random" else "random"
    if size is not None:
        options["size"] = parse_size(size)
    if resize is not None:
        options["resize"] = parse_resize(resize)
    if mean is not None:
        options["mean"] = parse_floats("--mean", mean)
    if std is not None:
        options["std"] = parse_floats("--std", std)
        if min(options["std"]) <= 0:
            raise UsageError(f"--std {std}: every value must be above 0")
    if interpolation is not None:
        options["interpolation"] = interpolation
    return options


def require_device(name: str) -> str:
    """The value of ``--device``, unchanged.

    Raises:
        UsageError: It is not one that the commands know.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name} is not a device", hint="use --device auto, cpu or cuda")
    return name


def parse_size(text: str) -> tuple[int, int]:
    """Read ``224`` or ``HEIGHTxWIDTH`` as (height, width) in pixels."""
    parts = text.lower().split("x")
    if len(parts) <= 2 and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise UsageError(f"--size {text} is not a size", hint="use --size 224 or --size 192x256 (height x width)")


def parse_resize(text: str) -> int | str | None:
    """Read ``256`` as pixels of the short side, ``none`` as ``None``, ``auto`` as it stands."""
    if text.lower() == "none":
        return None
    if text.lower() == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(
        f"--resize {text} is not a size", hint="use --resize 256, --resize none or --resize auto"
    )


def parse_floats(flag: str, text: str) -> tuple[float, ...]:
    """Read ``0.5,0.5,0.5`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{flag} {text} is not a list of numbers", hint=f"separate them by commas: {flag} 0.5,0.5,0.5"
        ) from None
