"""Images of a set that stand out by exposure, contrast, colour or size, named for a person to look at.

An image stands out where a measure of it is far from the set's median, in units of the set's own spread:
the modified z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993), which a few
extreme images cannot hide from by widening the spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from metaaug_cli.networks.preprocessing import Preprocessing

LIMIT = 3.5
"""Modified z-score beyond which an image stands out (the authors' recommendation)."""

_NORMAL = 0.6745  # the median absolute deviation of a standard normal variable
_FEWEST = 8
_CHUNK = 64
_GREY = 2.0


def find_outliers(
    images: Tensor, preprocessing: Preprocessing, sources: Sequence[str], root: Path | None = None
) -> tuple[str, ...]:
    """``source: what is unusual`` for every image that stands out, in the set's order.

    Args:
        images: Normalised (N, C, H, W).
        preprocessing: What made them.
        sources: Name of each image.
        root: The folder the names are relative to; without it the sizes of the files are not looked at.
    """
    if len(sources) < _FEWEST:
        return ()
    found: list[list[str]] = [[] for _ in sources]
    for name, unit, values, floor in _pixel_measures(images, preprocessing):
        median = values.median().item()
        for index in _standing_out(values, floor):
            found[index].append(f"{name} {values[index]:.0f}, the set's median is {median:.0f}{unit}")
    if preprocessing.channels == 3:
        _note_grey(images, preprocessing, found)
    if root is not None:
        _note_sizes(root, sources, found)
    return tuple(
        f"{source}: {'; '.join(notes)}" for source, notes in zip(sources, found, strict=True) if notes
    )


def modified_z(values: Tensor, floor: float = 0.0) -> Tensor:
    """Distance of each value (N,) from the median, in robust standard deviations of at least ``floor``."""
    centred = values.double() - values.double().median()
    spread = max(centred.abs().median().item() / _NORMAL, floor)
    return centred / spread if spread > 0 else torch.where(centred == 0, 0.0, math.inf)


def colourfulness(pixels: Tensor) -> Tensor:
    """Mean spread between the channels of each image, 0 for grey ones.

    Args:
        pixels: (N, 3, H, W).
    """
    return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


def _pixel_measures(images: Tensor, preprocessing: Preprocessing) -> list[tuple[str, str, Tensor, float]]:
    """(name, unit, one value per image, least spread) of each measure, all on the 0 to 255 scale."""
    brightness, contrast, casts = [], [], []
    for chunk in images.split(_CHUNK):
        pixels = preprocessing.denormalise(chunk).mul(255)
        grey = pixels.mean(1)
        brightness.append(grey.mean((1, 2)))
        contrast.append(grey.std((1, 2), correction=0))
        means = pixels.mean((2, 3))
        casts.append(means[:, 0] - means[:, -1])
    measures = [
        ("brightness", " of 255", torch.cat(brightness), 4.0),
        ("contrast", " (standard deviation)", torch.cat(contrast), 2.0),
    ]
    if preprocessing.channels == 3:
        measures.append(("red minus blue", "", torch.cat(casts), 4.0))
    return measures


def _standing_out(values: Tensor, floor: float) -> list[int]:
    return torch.nonzero(modified_z(values, floor).abs() > LIMIT).flatten().tolist()


def _note_grey(images: Tensor, preprocessing: Preprocessing, found: list[list[str]]) -> None:
    """Grey images are worth a word in a colour set only."""
    parts = [colourfulness(preprocessing.denormalise(chunk).mul(255)) for chunk in images.split(_CHUNK)]
    values = torch.cat(parts)
    if values.median().item() <= _GREY:
        return
    for index in torch.nonzero(values <= _GREY).flatten().tolist():
        found[index].append("no colour")


def _note_sizes(root: Path, sources: Sequence[str], found: list[list[str]]) -> None:
    sizes = [_size(root / source) for source in sources]
    pixels = torch.tensor([math.log(width * height) / 2 for width, height in sizes])
    shapes = torch.tensor([math.log(width / height) for width, height in sizes])
    middle = math.exp(pixels.median().item())
    large, long = set(_standing_out(pixels, 0.1)), set(_standing_out(shapes, 0.1))
    for index in sorted(large | long):
        width, height = sizes[index]
        typical = (
            f"the set's median is {middle:.0f}x{middle:.0f} pixels" if index in large else "unusually long"
        )
        found[index].append(f"{width}x{height} pixels, {typical}")


def _size(path: Path) -> tuple[int, int]:
    """Width and height from the file's header; the pixels are not decoded again."""
    with Image.open(path) as image:
        return image.size
