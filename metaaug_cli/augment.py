"""Fixed augmentations: a pool of changed copies of the calibration images, drawn once before learning.

A block that is learned on a few images overfits them. Copies cost no time per step: both streams walk them
once per block like any image, and every batch takes half of its images from the originals and half from
the copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from metaaug_cli.errors import RecipeError
from metaaug_cli.preprocessing import Preprocessing

_LARGEST_ROTATION = 30.0  # degrees
_LARGEST_SHEAR = math.degrees(math.atan(0.3))
_LARGEST_SHIFT = 0.2  # of the side
_LEAST_CROP = 0.6  # of the area

Operation = Callable[[Tensor, torch.Generator], Tensor]


def augmented_copies(
    images: Tensor, preprocessing: Preprocessing, kind: str, copies: int, generator: torch.Generator
) -> Tensor:
    """Changed copies of normalised images.

    Args:
        images: (N, C, H, W), normalised.
        preprocessing: What normalised them; the copies stay inside its pixel range.
        kind: Operations joined by ``+``, applied in the order of ``OPERATIONS`` (``flip+geometric+mixup``).
        copies: Copies of each image.
        generator: CPU generator.

    Returns:
        (N * copies, C, H, W), normalised.

    Raises:
        RecipeError: An operation that does not exist.
    """
    chosen = parse_kind(kind)
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    pixels = images * std + mean
    made = []
    for _ in range(copies):
        copy = pixels
        for name in chosen:
            copy = OPERATIONS[name](copy, generator)
        made.append((copy.clamp(0, 1) - mean) / std)
    return torch.cat(made)


def parse_kind(kind: str) -> list[str]:
    """The operations of a kind, in the order they are applied.

    Raises:
        RecipeError: An operation that does not exist.
    """
    wanted = [part.strip() for part in kind.split("+")]
    unknown = [name for name in wanted if name not in OPERATIONS]
    if unknown:
        raise RecipeError(
            f"augmentation.kind: no operation named {', '.join(unknown)}",
            hint=f"none, or any of {', '.join(OPERATIONS)}, joined by +",
        )
    return [name for name in OPERATIONS if name in wanted]


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of 60 to 100 % of the area, resized to the whole."""
    size = images.shape[2:]
    return torch.stack([_crop_one(image, generator, size) for image in images])


def _crop_one(image: Tensor, generator: torch.Generator, size: Sequence[int]) -> Tensor:
    area, top, left = torch.rand(3, generator=generator).tolist()
    share = math.sqrt(_LEAST_CROP + (1 - _LEAST_CROP) * area)
    height, width = round(share * size[0]), round(share * size[1])
    return tv.resized_crop(
        image,
        round(top * (size[0] - height)),
        round(left * (size[1] - width)),
        height,
        width,
        list(size),
        antialias=True,
    )


def _geometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """One of rotation, two shears and two shifts per image, of random size and direction."""
    return torch.stack([_geometric_one(image, generator) for image in images])


def _geometric_one(image: Tensor, generator: torch.Generator) -> Tensor:
    which = int(torch.randint(5, (), generator=generator))
    amount = float(torch.rand((), generator=generator)) * 2 - 1
    height, width = image.shape[1:]
    shift_x, shift_y = round(amount * _LARGEST_SHIFT * width), round(amount * _LARGEST_SHIFT * height)
    return tv.affine(
        image,
        angle=amount * _LARGEST_ROTATION if which == 0 else 0.0,
        translate=[shift_x if which == 1 else 0, shift_y if which == 2 else 0],
        scale=1.0,
        shear=[
            amount * _LARGEST_SHEAR if which == 3 else 0.0,
            amount * _LARGEST_SHEAR if which == 4 else 0.0,
        ],
        interpolation=v2.InterpolationMode.BILINEAR,
    )


def _photometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness and contrast, each by a factor of 0.6 to 1.4 per image."""
    factors = 0.6 + 0.8 * torch.rand(len(images), 2, generator=generator)
    changed = [
        tv.adjust_contrast(tv.adjust_brightness(image, bright), contrast)
        for image, (bright, contrast) in zip(images, factors.tolist(), strict=True)
    ]
    return torch.stack(changed)


def _mixup(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image blended with another one, by a share uniform in 0 to 1 (MixUp: Zhang et al., ICLR 2018)."""
    other = images[torch.randperm(len(images), generator=generator)]
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    return share * images + (1 - share) * other


OPERATIONS: dict[str, Operation] = {
    "flip": _flip,
    "crop": _crop,
    "geometric": _geometric,
    "photometric": _photometric,
    "mixup": _mixup,
}
"""Operations by name, in the order they are applied."""
