"""A calibration set as PNG files, for looking at and for tools that read folders."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from metaaug_cli.data import CalibrationSet
from metaaug_cli.errors import InputError, UsageError


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds something, or a file of that name.

    Raises:
        UsageError: As said.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is not an empty folder, and synthetic images are written there",
            hint="name a new folder, or leave --images out; to draw from images leave --data-free out",
        )


def write_pngs(calibration: CalibrationSet, folder: Path) -> None:
    """Write every image of a set as ``SOURCE.png``, pixel for pixel where it is on the 8-bit grid.

    Args:
        calibration: The set.
        folder: Made where it is missing.

    Raises:
        InputError: A file cannot be written.
    """
    preprocessing = calibration.preprocessing
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image, source in zip(calibration.images, calibration.sources, strict=True):
            array = preprocessing.pixels(image).permute(1, 2, 0).squeeze(-1).numpy()
            Image.fromarray(array).save(folder / f"{Path(source).name}.png", compress_level=1)
    except OSError as exc:
        raise InputError(f"cannot write images to {folder}: {exc}") from exc
