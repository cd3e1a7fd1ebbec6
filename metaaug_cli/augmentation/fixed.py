"""Fixed augmentations: a pool of changed copies of the calibration images, drawn once before learning.

A block that is learned on a few images overfits them. Copies cost no time per step: both streams walk them
once per block like any image, and every batch takes half of its images from the originals and half from
the copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from metaaug_cli.augmentation.policies import (
    ALL,
    GEOMETRIC,
    PHOTOMETRIC,
    Operation,
    drawing_from,
    random_policy,
    trivial_policy,
)
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.recipe.augment_kinds import parse_kind

_LARGEST_ROTATION = 30.0  # degrees
_LARGEST_SHEAR = math.degrees(math.atan(0.3))
_LARGEST_SHIFT = 0.2  # of the side
_LEAST_CROP = 0.6  # of the area


def augmented_copies(
    images: Tensor, preprocessing: Preprocessing, kind: str, copies: int, generator: torch.Generator
) -> Tensor:
    """Changed copies of normalised images.

    Args:
        images: (N, C, H, W), normalised.
        preprocessing: What normalised them; the copies stay inside its pixel range.
        kind: ``none``, or operations joined by ``+`` (``flip+geometric+mixup``), applied in the order of
            ``OPERATIONS``. ``augment_kinds.learned_part`` separates these from ``metaaug``.
        copies: Copies of each image.
        generator: CPU generator, the only source of randomness.

    Returns:
        (N * copies, C, H, W), normalised: all images once, then all again.

    Raises:
        RecipeError: An operation that does not exist.
    """
    chosen = parse_kind(kind)
    pixels = preprocessing.denormalise(images)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    made = []
    for _ in range(copies):
        copy = pixels
        for name in chosen:
            copy = OPERATIONS[name](copy, generator)
        made.append((copy.clamp(0, 1) - mean) / std)
    return torch.cat(made)


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


def _rotate(images: Tensor, generator: torch.Generator) -> Tensor:
    """A rotation by up to 30 degrees either way."""
    angles = (2 * torch.rand(len(images), generator=generator) - 1) * _LARGEST_ROTATION
    return torch.stack(
        [_affine(image, angle=angle) for image, angle in zip(images, angles.tolist(), strict=True)]
    )


def _geometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """One of rotation, two shears and two shifts per image, of random size and direction."""
    return torch.stack([_geometric_one(image, generator) for image in images])


def _geometric_one(image: Tensor, generator: torch.Generator) -> Tensor:
    which = int(torch.randint(5, (), generator=generator))
    amount = float(torch.rand((), generator=generator)) * 2 - 1
    shear = amount * _LARGEST_SHEAR
    height, width = image.shape[1:]
    shift_x, shift_y = round(amount * _LARGEST_SHIFT * width), round(amount * _LARGEST_SHIFT * height)
    return _affine(
        image,
        angle=amount * _LARGEST_ROTATION if which == 0 else 0.0,
        translate=(shift_x if which == 1 else 0, shift_y if which == 2 else 0),
        shear=(shear if which == 3 else 0.0, shear if which == 4 else 0.0),
    )


def _affine(
    image: Tensor,
    *,
    angle: float = 0.0,
    translate: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """One image (C, H, W) moved; what comes into view has the image's mean colour."""
    # Black would move the means of the feature maps further. Filling with zero around a shifted image leaves
    # no dark seam, which torchvision's bilinear blend with a fill colour does.
    mean = image.mean((1, 2), keepdim=True)
    moved: Tensor = tv.affine(
        image - mean,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return moved + mean


def _brightness(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness times 0.6 to 1.4."""
    factors = _factors(len(images), 1, generator)
    return torch.stack([tv.adjust_brightness(image, f) for image, (f,) in zip(images, factors, strict=True)])


def _contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast times 0.6 to 1.4."""
    factors = _factors(len(images), 1, generator)
    return torch.stack([tv.adjust_contrast(image, f) for image, (f,) in zip(images, factors, strict=True)])


def _photometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness and contrast, each by a factor of 0.6 to 1.4 per image."""
    changed = [
        tv.adjust_contrast(tv.adjust_brightness(image, bright), contrast)
        for image, (bright, contrast) in zip(images, _factors(len(images), 2, generator), strict=True)
    ]
    return torch.stack(changed)


def _factors(images: int, each: int, generator: torch.Generator) -> list[list[float]]:
    factors: list[list[float]] = (0.6 + 0.8 * torch.rand(images, each, generator=generator)).tolist()
    return factors


def _mixup(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image blended with another one, by a share uniform in 0 to 1 (MixUp: Zhang et al., ICLR 2018)."""
    other = images[_partners(len(images), generator)]
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    return share * images + (1 - share) * other


def _cutmix(images: Tensor, generator: torch.Generator) -> Tensor:
    """A rectangle of another image, of an area share uniform in 0 to 1 (CutMix: Yun et al., ICCV 2019)."""
    other = _partners(len(images), generator)
    cutmix, no_labels = v2.CutMix(num_classes=1), torch.zeros(2, dtype=torch.int64)
    with drawing_from(generator):
        # torchvision draws one rectangle per batch, so each image gets a batch of two with its partner.
        pairs = [cutmix(images[[i, j]], no_labels)[0][0] for i, j in enumerate(other.tolist())]
    return torch.stack(pairs)


def _partners(count: int, generator: torch.Generator) -> Tensor:
    """Another image for each (count,): one cycle through all of them, so that none meets itself."""
    order = torch.randperm(count, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


OPERATIONS: dict[str, Operation] = {
    "flip": _flip,
    "crop": _crop,
    "rotate": _rotate,
    "geometric": _geometric,
    "brightness": _brightness,
    "contrast": _contrast,
    "photometric": _photometric,
    "trivial": trivial_policy(ALL),
    "trivial-geometric": trivial_policy(GEOMETRIC),
    "trivial-photometric": trivial_policy(PHOTOMETRIC),
    "rand": random_policy(ALL),
    "rand-geometric": random_policy(GEOMETRIC),
    "rand-photometric": random_policy(PHOTOMETRIC),
    "mixup": _mixup,
    "cutmix": _cutmix,
}
"""Operations by name, in the order they are applied (``augment_kinds.OPERATION_NAMES``)."""
