"""A calibration set as PNG files, for looking at and for tools that read folders."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.errors import UsageError
from metaaug_cli.files import not_written, require_writable


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds something, a file of that name, or a place where no folder can be made.

    Raises:
        UsageError: There is something.
        InputError: It cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is not an empty folder, and synthetic images are written there",
            hint="name a new folder, or leave --images out; to draw from images leave --data-free out",
        )
    require_writable(folder / "any.png")


def write_pngs(calibration: CalibrationSet, folder: Path) -> None:
    """Write every image of a set as ``NAME.png``, pixel for pixel where it is on the 8-bit grid.

    The name is the last part of the image's source; of images with the same one the last is kept.

    Args:
        calibration: The set.
        folder: Made where it is missing.

    Raises:
        InputError: A file cannot be written.
        OSError: The disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, source in enumerate(calibration.sources):
            to_picture(calibration, index).save(folder / f"{Path(source).name}.png", compress_level=1)
    except OSError as exc:
        raise not_written(folder, exc) from exc


def to_picture(calibration: CalibrationSet, index: int) -> Image.Image:
    """One image of a set as a viewable picture; values outside the pixel range are clipped."""
    data = calibration.preprocessing.to_pixels(calibration.images[index]).permute(1, 2, 0).numpy()
    return Image.fromarray(data[:, :, 0] if data.shape[2] == 1 else data)
