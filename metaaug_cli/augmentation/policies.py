"""TrivialAugment and RandAugment, whole or one half of their transforms, drawn from a generator.

Both are torchvision's: Müller & Hutter, *TrivialAugment*, ICCV 2021 (its wide space: one transform per image
at a random strength), and Cubuk et al., *RandAugment*, NeurIPS 2020 (two transforms at strength 9 of 30).
They run on 8-bit pixels, which posterize and equalize are defined on; a float image is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

IDENTITY = frozenset({"Identity"})
GEOMETRIC = IDENTITY | {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
PHOTOMETRIC = IDENTITY | {
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Posterize",
    "Sharpness",
    "Solarize",
}
ALL = GEOMETRIC | PHOTOMETRIC
"""The 14 transforms by torchvision's names; the identity belongs to both halves."""

_WIDE_SHIFT = 32 / 224  # of the side

Operation = Callable[[Tensor, torch.Generator], Tensor]


def trivial_policy(names: frozenset[str]) -> Operation:
    """TrivialAugment over some of the transforms: one of them per image.

    The published shift is up to 32 pixels whatever the size, which can push all of a 32-pixel image out of
    view; here it is the same share of the side at every size, and 32 pixels at 224.

    Args:
        names: From ``ALL``.
    """
    return _policy(v2.TrivialAugmentWide, names, {"TranslateX": _wide_shift_x, "TranslateY": _wide_shift_y})


def random_policy(names: frozenset[str]) -> Operation:
    """RandAugment over some of the transforms: two draws per image, the same one twice at times.

    Args:
        names: From ``ALL``.
    """
    return _policy(v2.RandAugment, names, {})


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let code that knows only torch's global CPU generator draw from this one; the global one is put back.

    Args:
        generator: CPU generator; it advances by what was drawn.
    """
    outside = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def _policy(
    transform: type[v2.TrivialAugmentWide] | type[v2.RandAugment],
    names: frozenset[str],
    replaced: dict[str, Callable[[int, int, int], Tensor]],
) -> Operation:
    # torchvision has no public way to narrow the space; each entry is (strengths by bins and size, signed).
    whole = transform._AUGMENTATION_SPACE
    space = {key: (replaced.get(key, entry[0]), entry[1]) for key, entry in whole.items() if key in names}

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8)
        with drawing_from(generator):
            changed = [_with_space(transform, space, image)(image) for image in pixels]
        return torch.stack(changed).to(images.dtype) / 255

    return apply


def _with_space(transform: Callable[..., Any], space: dict[str, Any], image: Tensor) -> nn.Module:
    """The transform of one image (C, H, W): what comes into view has the image's mean colour."""
    fill = image.float().mean((1, 2)).tolist()
    # Nearest is torchvision's default too; its bilinear blend leaves a dark seam along the fill.
    made = transform(interpolation=v2.InterpolationMode.NEAREST, fill=fill)
    made._AUGMENTATION_SPACE = space
    return made


def _wide_shift_x(bins: int, _height: int, width: int) -> Tensor:
    return torch.linspace(0.0, _WIDE_SHIFT * width, bins)


def _wide_shift_y(bins: int, height: int, _width: int) -> Tensor:
    return torch.linspace(0.0, _WIDE_SHIFT * height, bins)
