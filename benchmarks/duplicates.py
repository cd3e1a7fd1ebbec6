"""Copies that are recognised, for docs/guides/calibration-sets.md: ``python benchmarks/duplicates.py``.

Changes 300 images of each calibration folder the way copying does and counts which changed ones are
recognised among the originals; counts pairs that are called copies in the unchanged folder too. Appends to
benchmarks/results/duplicates.jsonl.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from common import SHARED, is_recorded, record
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from metaaug_cli.calibration.duplicates import DuplicateFinder

NAME = "duplicates"
COUNT = 300

Change = Callable[[Image.Image], Image.Image]


def _jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

    return change


def _cropped(fraction: float) -> Change:
    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        cut = round(width * fraction), round(height * fraction)
        box = (*cut, width - cut[0] // 2, height)
        return image.crop(box).resize((width, height), Image.Resampling.BICUBIC)

    return change


CHANGES: dict[str, Change] = {
    "saved as JPEG, quality 75": _jpeg(75),
    "saved as JPEG, quality 30": _jpeg(30),
    "halved and enlarged again": lambda i: i.resize((i.width // 2, i.height // 2)).resize(i.size),
    "30 % brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.3),
    "30 % less contrast": lambda i: ImageEnhance.Contrast(i).enhance(0.7),
    "half the saturation": lambda i: ImageEnhance.Color(i).enhance(0.5),
    "3 % cut off": _cropped(0.03),
    "6 % cut off": _cropped(0.06),
    "without colour": lambda i: i.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
}


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255


def run(folder: str, side: int) -> None:
    """Measure one folder of images."""
    paths = [path for path in sorted((SHARED / "data" / folder / "calib").rglob("*")) if path.is_file()]
    step = len(paths) // COUNT
    images = []
    for path in paths[::step][:COUNT]:
        with Image.open(path) as image:
            images.append(ImageOps.fit(image.convert("RGB"), (side, side)))
    for name, change in {"unchanged images": None, **CHANGES}.items():
        key = {"data": folder, "side": side, "change": name}
        if is_recorded(NAME, key):
            continue
        finder = DuplicateFinder()
        pairs = sum(finder.add(str(i), _pixels(image)) is not None for i, image in enumerate(images))
        found = pairs
        if change is not None:
            found = sum(finder.add("copy", _pixels(change(image))) is not None for image in images)
        record(NAME, key, {"images": len(images), "found": found})
        print(key, found, flush=True)


def main() -> None:
    """Measure both folders."""
    torch.set_num_threads(1)
    run("cifar10", 32)
    run("imagenet", 224)


if __name__ == "__main__":
    main()
