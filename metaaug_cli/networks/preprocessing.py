"""How an image becomes a network's input: orient, convert, resize, centre-crop, normalise.

The arithmetic is torchvision's evaluation transform on PIL images (antialiased resize, truncated
long side, crop offsets rounded half to even), so a network sees here what it saw when its accuracy
was published.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metaaug_cli.errors import InputError

Resize = int | None | Literal["auto"]

CROP_FRACTION = 0.875
"""Crop side over resized side: 224 / 256, the customary ImageNet evaluation transform."""

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_MODES = {1: "L", 3: "RGB"}
_DEEP_JUDGED = 4
_DEEP_FLOOR = 4096

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input images.

    Args:
        size: Height and width in pixels that the network takes.
        resize: Short side in pixels before the centre crop; ``None`` never resizes; ``"auto"``
            resizes only an image that does not already fit the crop (smaller than ``size``, or
            larger than ``size / 0.875``), and then to ``size / 0.875``.
        interpolation: One of ``bilinear``, ``bicubic``, ``nearest``; the first two antialias.
        mean: Per-channel mean of pixels scaled to [0, 1]; one entry for grey, three for RGB.
        std: Per-channel standard deviation of pixels scaled to [0, 1].

    Raises:
        InputError: A value is outside its range or the channel counts differ.
    """

    size: tuple[int, int]
    resize: Resize
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_resize(self.resize, self.size)
        if self.interpolation not in RESAMPLING:
            raise InputError(
                f"unknown interpolation {self.interpolation!r}",
                hint=f"--interpolation takes one of: {', '.join(RESAMPLING)}",
            )
        _check_normalisation(self.mean, self.std)

    @property
    def channels(self) -> int:
        """Number of image channels the network takes: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn one decoded image into network input.

        Args:
            image: Any PIL image; EXIF orientation is applied, grey, palette and CMYK converted. Whole
                numbers of more than 8 bits are taken as 0 to 65535.

        Returns:
            Normalised float32 tensor of shape (C, H, W).

        Raises:
            ValueError: The image cannot be converted, or is smaller than the crop and ``resize``
                forbids enlarging it. Callers that read folders skip such an image and say why.
        """
        return self.normalise(self.crop(image))

    def crop(self, image: Image.Image) -> Tensor:
        """The pixels the network sees, before normalisation: uint8 (C, H, W).

        Raises:
            ValueError: As for calling the object.
        """
        image = _convert(_upright(image), _MODES[self.channels])
        image = self._resized(image)
        image = _centre_crop(image, self.size)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        if pixels.ndim == 2:
            pixels = pixels.unsqueeze(-1)
        return pixels.permute(2, 0, 1).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Map uint8 pixels (..., C, H, W) to normalised float32."""
        mean, std = self._channel_constants()
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def denormalise(self, images: Tensor) -> Tensor:
        """Map normalised images (..., C, H, W) back to the [0, 1] pixel scale, not clipped."""
        mean, std = self._channel_constants()
        return images * std + mean

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map normalised images (..., C, H, W) to the nearest uint8 pixels, clipped to 0 to 255."""
        return self.denormalise(images).mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def pixel_bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest normalised value each channel can take, as two tensors (C,)."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0.0 - mean) / std, (1.0 - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, accepted by ``from_dict``."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Inverse of ``to_dict``.

        Raises:
            InputError: A key is missing or unknown, or a value is not valid.
        """
        expected = {"size", "resize", "interpolation", "mean", "std"}
        if set(values) != expected:
            wrong = ", ".join(sorted(set(values) ^ expected))
            raise InputError(f"stored preprocessing has missing or unknown entries: {wrong}")
        try:
            height, width = (int(side) for side in values["size"])
            mean = tuple(float(value) for value in values["mean"])
            std = tuple(float(value) for value in values["std"])
        except (TypeError, ValueError, OverflowError) as exc:
            raise InputError(f"stored preprocessing is not valid: {exc}") from exc
        return cls((height, width), values["resize"], str(values["interpolation"]), mean, std)

    def describe(self) -> str:
        """One line for people, e.g. ``224x224 centre crop, resize 256 bilinear, mean ...``."""
        height, width = self.size
        resize = "no resize" if self.resize is None else f"resize {self.resize} {self.interpolation}"
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        colour = "RGB" if self.channels == 3 else "grey"
        return f"{height}x{width} {colour} centre crop, {resize}, mean {mean}, std {std}"

    def differences(self, other: Preprocessing) -> list[str]:
        """Readable ``field: this, not that`` entries for every field in which two differ."""
        found = []
        for key, mine in self.to_dict().items():
            theirs = other.to_dict()[key]
            if not _same(mine, theirs):
                found.append(f"{key}: {_plain(mine)}, not {_plain(theirs)}")
        return found

    def _channel_constants(self) -> tuple[Tensor, Tensor]:
        shape = (self.channels, 1, 1)
        return torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)

    def _resized(self, image: Image.Image) -> Image.Image:
        target = resized_size((image.height, image.width), self.size, self.resize)
        if min(target) < 1 or max(target) > 65_500:
            raise ValueError(f"{image.width}x{image.height} px is too elongated to resize")
        if target == (image.height, image.width):
            return image
        return image.resize((target[1], target[0]), RESAMPLING[self.interpolation])


def resized_size(image: tuple[int, int], crop: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Height and width to resize to before the centre crop.

    Args:
        image: Height and width of the image in pixels.
        crop: Height and width the network takes.
        resize: As in ``Preprocessing``.
    """
    height, width = image
    if resize is None:
        return image
    if resize == "auto":
        fill = min(height / crop[0], width / crop[1])
        if 1 <= fill <= 1 / CROP_FRACTION:
            return image
        tall_enough = height / crop[0] <= width / crop[1]
        anchor = round((crop[0] if tall_enough else crop[1]) / CROP_FRACTION)
        if tall_enough:
            return anchor, max(int(anchor * width / height), crop[1])
        return max(int(anchor * height / width), crop[0]), anchor
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


class _DeepImages:
    """Watches the grey images of 16 bits, and warns once where all of the first ones are all but black."""

    def __init__(self) -> None:
        self._seen = 0
        self._greatest = 0

    def add(self, greatest: int) -> None:
        """Take note of one image's greatest value."""
        self._seen += 1
        self._greatest = max(self._greatest, greatest)
        if self._seen == _DEEP_JUDGED and self._greatest < _DEEP_FLOOR:
            _logger.warning(
                "the 16-bit images hold values up to %d only and come out dark: 0 to 65535 is taken as black "
                "to white (scale the files to that range, or convert them to 8 bits)",
                self._greatest,
            )


_deep_images = _DeepImages()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, AttributeError):
        # Damaged metadata says nothing about the pixels; decoding them still raises if they are bad.
        image.load()
        return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert to ``L`` or ``RGB``; alpha is dropped, as torchvision's and timm's loaders do."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255 and would give a white image.
        values = np.asarray(image).astype(np.int64)
        greatest = int(values.max(initial=0))
        is_deep = image.mode != "I" or greatest > 255  # "I" has no range of its own
        if is_deep:
            _deep_images.add(greatest)
        image = Image.fromarray((values >> 8 * is_deep).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if image.height < height or image.width < width:
        raise ValueError(
            f"{image.width}x{image.height} px is smaller than the {width}x{height} crop "
            "(--resize auto enlarges it)"
        )
    top = round((image.height - height) / 2)
    left = round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _check_size(size: tuple[int, int]) -> None:
    sides: Sequence[object] = size
    if len(sides) != 2 or not all(_is_int(side) and side >= 1 for side in sides):
        raise InputError(f"input size must be two positive numbers of pixels, got {size!r}")


def _check_resize(resize: object, size: tuple[int, int]) -> None:
    if resize is None or resize == "auto":
        return
    if not _is_int(resize):
        raise InputError(f"resize must be a number of pixels, 'auto' or none, got {resize!r}")
    if resize < max(size):
        raise InputError(
            f"resize {resize} is smaller than the {size[0]}x{size[1]} crop that follows it",
            hint=f"pass --resize {round(max(size) / CROP_FRACTION)}, auto or none, or a smaller --size",
        )


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) not in _MODES or len(mean) != len(std):
        raise InputError(
            f"mean has {len(mean)} and std {len(std)} values",
            hint="--mean and --std take three values each (RGB) or one each (grey)",
        )
    if not all(math.isfinite(v) for v in (*mean, *std)) or min(std) <= 0:
        raise InputError(
            f"mean {_plain(mean)} and std {_plain(std)} must be finite and std above zero",
            hint="both are on the [0, 1] pixel scale: divide 0-255 values by 255",
        )
    if max(map(abs, mean)) > 1 or max(std) > 1:
        raise InputError(
            f"mean {_plain(mean)} and std {_plain(std)} are not on the [0, 1] pixel scale",
            hint="divide 0-255 values by 255, e.g. --mean 123.675 becomes --mean 0.485",
        )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(
            math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(mine, theirs, strict=True)
        )
    return bool(mine == theirs)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(f"{v:g}" for v in value)
    return "none" if value is None else str(value)
