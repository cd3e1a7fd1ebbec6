"""The images that a synthesis starts from: noise with the spectrum and the variety of photographs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metaaug_cli.networks.preprocessing import Preprocessing

# Of pixels in [0, 1], from natural images: their mean and deviation, and how the variance is shared out.
_MEAN, _DEVIATION = 0.45, 0.27
_BETWEEN = 0.2  # the images' mean brightness and colour
_COLOUR = 0.2  # what each channel has of its own
_LEAST_CONTRAST, _MOST_CONTRAST = 0.5, 1.5


def natural_noise(
    count: int, size: tuple[int, int], preprocessing: Preprocessing, generator: torch.Generator
) -> Tensor:
    """Random images that differ from each other as photographs do, in brightness, colour and contrast.

    Amplitudes fall with the spatial frequency as 1/f (Field, J. Opt. Soc. Am. A, 1987).

    Args:
        count: N.
        size: (H, W).
        preprocessing: Normalises them.
        generator: On the CPU.

    Returns:
        (N, C, H, W), normalised; some pixels are beyond the valid range.
    """
    channels = preprocessing.channels
    texture = _coloured(_pink(torch.randn(count, channels + 1, *size, generator=generator)))
    offset = _coloured(torch.randn(count, channels + 1, 1, 1, generator=generator))
    contrast = torch.empty(count, 1, 1, 1).uniform_(_LEAST_CONTRAST, _MOST_CONTRAST, generator=generator)
    mixed = math.sqrt(1 - _BETWEEN) * contrast * texture + math.sqrt(_BETWEEN) * offset
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (_MEAN + _DEVIATION * mixed - mean) / std


def white_noise(
    count: int, size: tuple[int, int], preprocessing: Preprocessing, generator: torch.Generator
) -> Tensor:
    """Gaussian noise of variance 1 in every normalised pixel, (N, C, H, W), as published."""
    return torch.randn(count, preprocessing.channels, *size, generator=generator)


def _pink(white: Tensor) -> Tensor:
    """White noise (…, H, W) of variance 1 with amplitudes that fall as 1/f, without its mean; variance 1."""
    height, width = white.shape[-2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    frequency = (rows.square() + columns.square()).sqrt()
    amplitude = torch.where(frequency > 0, 1 / frequency.clamp(min=1 / max(height, width)), 0.0)
    amplitude /= amplitude.square().mean().sqrt()
    half = amplitude[:, : width // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(white) * half, s=(height, width))


def _coloured(planes: Tensor) -> Tensor:
    """Channels (N, C, …) with a common part from planes (N, C + 1, …), the first of which it is."""
    return math.sqrt(1 - _COLOUR) * planes[:, :1] + math.sqrt(_COLOUR) * planes[:, 1:]
