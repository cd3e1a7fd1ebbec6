"""The augmenter T: a small network that turns calibration images into training images (MetaAug, ECCV 2024).

Three forms. ``unet`` is the published one and has to be warmed up to reproduce its input; ``residual`` adds
the same UNet's output, zero at the start, to the image; ``policy`` learns how strongly to turn, shear, shift,
colour and mix each image. All outputs stay inside the valid pixel range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaaug_cli.networks.preprocessing import Preprocessing

MOST_LEVELS = 4
_SMALLEST_MAP = 4
# The largest changes of the policy, which come together: half of what the fixed operations do one at a time.
_TURN = math.radians(15.0)
_SHEAR, _SHIFT = 0.15, 0.1  # tangent of the angle; share of the side
_MIX = 0.5  # share of the other image
_COLOUR = 0.4  # brightness and contrast change by up to this share
_GEOMETRIC, _COLOURS = 5, 2
_START_STRENGTH = 0.0  # half of the largest change

Draws = tuple[Tensor, ...]


@dataclass(frozen=True)
class AugmenterSpec:
    """What decides an augmenter's shape and bounds.

    Args:
        form: "unet", "residual" or "policy".
        base_width: Channels of the UNet's first level, doubled with each level.
        epsilon: Largest mean squared distance of T(x) from x, as a share of the images' variance.
        distance: "projection" holds each image inside that distance; "margin" and "published" leave it to
            the loss.
    """

    form: str = "unet"
    base_width: int = 64
    epsilon: float = 0.3
    distance: str = "projection"


class Augmenter(nn.Module):
    """T: images (N, C, H, W) to images of the same shape, inside the pixel range.

    Args:
        spec: Form, width and distance.
        preprocessing: Gives the pixel range in the network's normalised units.
        size: (H, W) of the images.
        variance: Mean variance of the calibration images' channels; the unit of ``spec.epsilon``.
        seed: Of the initial weights.
    """

    def __init__(
        self,
        spec: AugmenterSpec,
        preprocessing: Preprocessing,
        size: tuple[int, int],
        variance: float,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.spec, self.radius = spec, spec.epsilon * variance
        low, high = (bound.view(-1, 1, 1) for bound in preprocessing.pixel_bounds())
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        channels = preprocessing.channels
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed seeds GPUs too
            self.network: nn.Module = (
                Policy(channels, spec.base_width)
                if spec.form == "policy"
                else UNet(channels, spec.base_width, levels_for(size))
            )
        if isinstance(self.network, UNet) and spec.form == "residual":
            nn.init.zeros_(self.network.last.weight)
            nn.init.zeros_(self.network.last.bias)  # type: ignore[arg-type]

    low: Tensor
    high: Tensor

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """What is random about T of ``count`` images: for a policy directions and partners, else nothing."""
        if not isinstance(self.network, Policy):
            return ()
        return self.network.draw(count, generator)

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """T(x); ``draws`` are from ``draw`` and on the images' device, or drawn anew."""
        if isinstance(self.network, Policy):
            directions, partners = draws or moved(self.draw(len(x)), x.device)
            return torch.clamp(self.network(x, directions, partners), self.low, self.high)
        made = self.network(x)
        if self.spec.form == "residual":
            made = x + made
        if self.spec.distance == "projection":
            made = project(x, made, self.radius)
        return torch.clamp(made, self.low, self.high)


def project(x: Tensor, made: Tensor, radius: float) -> Tensor:
    """``made`` drawn towards ``x`` until mean (made - x)^2 of each image is at most ``radius``."""
    change = made - x
    distance = change.square().flatten(1).mean(1)
    factor = torch.sqrt(radius / distance.clamp(min=radius))
    return x + change * factor.view(-1, *[1] * (x.dim() - 1))


def levels_for(size: tuple[int, int]) -> int:
    """Halvings of a UNet: four at most, fewer where the smallest map would be under 4 x 4; at least one."""
    return max(1, min(MOST_LEVELS, int(math.log2(max(min(size) / _SMALLEST_MAP, 1.0)))))


class UNet(nn.Module):
    """Double 3x3 conv-BN-ReLU per level, transposed convolutions upwards (Ronneberger et al., MICCAI 2015).

    Images of any size: the border is repeated up to the next multiple of 2^levels and cut off again.
    """

    def __init__(self, channels: int, base_width: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        widths = [base_width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            _double(before, after) for before, after in zip([channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(deep, flat, 2, stride=2)
            for flat, deep in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.merge = nn.ModuleList(_double(2 * flat, flat) for flat in widths[-2::-1])
        self.last = nn.Conv2d(base_width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        height, width = x.shape[2:]
        multiple = 2**self.levels
        y = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        skipped: list[Tensor] = []
        for number, stage in enumerate(self.down):
            y = stage(F.max_pool2d(y, 2) if number else y)
            skipped.append(y)
        for up, merge, skip in zip(self.up, self.merge, skipped[-2::-1], strict=True):
            y = merge(torch.cat([skip, up(y)], 1))
        result: Tensor = self.last(y)[:, :, :height, :width]
        return result


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source in (before, after):
        layers += [nn.Conv2d(source, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """Per-image strengths of five geometric changes, two colour changes and mixing with another image.

    The strengths come from a small convolutional network; their directions are drawn for each image, so that
    one image has many copies. Differentiable: bilinear sampling, arithmetic on pixels, a convex mix.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.strengths = nn.Linear(width, _GEOMETRIC + _COLOURS + 1)
        nn.init.zeros_(self.strengths.weight)
        nn.init.constant_(self.strengths.bias, _START_STRENGTH)

    def draw(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Directions (count, 8) in [0, 1) and another order of the images (count,); both on the CPU."""
        drawn = torch.rand(count, self.strengths.out_features, generator=generator)
        return drawn, torch.randperm(count, generator=generator)

    def forward(self, x: Tensor, drawn: Tensor, partner: Tensor) -> Tensor:
        """(N, C, H, W), values around 0; the other two as from ``draw``, on the same device."""
        strength = torch.sigmoid(self.strengths(self.features(x)))
        amount = strength * (2.0 * drawn - 1.0)
        y = _warp(x, amount[:, :_GEOMETRIC])
        brightness, contrast = (1 + _COLOUR * a.view(-1, 1, 1, 1) for a in amount[:, _GEOMETRIC:-1].unbind(1))
        centre = y.mean((1, 2, 3), keepdim=True)
        y = (y - centre) * contrast + centre * brightness
        share = (_MIX * strength[:, -1] * drawn[:, -1]).view(-1, 1, 1, 1)
        return y * (1 - share) + y[partner] * share


def _warp(x: Tensor, amount: Tensor) -> Tensor:
    """Rotate, shear and shift; ``amount`` (N, 5) in [-1, 1]."""
    tall = x.shape[2] / x.shape[3]  # both sides of an image are 2 to the sampling grid, whatever their pixels
    angle, shear_x, shear_y, shift_x, shift_y = amount.unbind(1)
    cos, sin = torch.cos(_TURN * angle), torch.sin(_TURN * angle)
    rows = [
        [cos + _SHEAR * shear_x * sin, tall * (_SHEAR * shear_x * cos - sin), 2 * _SHIFT * shift_x],
        [(sin + _SHEAR * shear_y * cos) / tall, cos - _SHEAR * shear_y * sin, 2 * _SHIFT * shift_y],
    ]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    field = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, field, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def augment(
    augmenter: Augmenter, images: Tensor, generator: torch.Generator | None = None, chunk: int = 64
) -> Tensor:
    """T of every image (N, C, H, W), on the images' device."""
    device = augmenter.low.device
    made = []
    for part in images.split(chunk):
        draws = moved(augmenter.draw(len(part), generator), device)
        made.append(augmenter(part.to(device), draws).to(images.device))
    return torch.cat(made)


def moved(draws: Draws, device: torch.device) -> Draws:
    """The same draws on ``device``."""
    return tuple(t.to(device, non_blocking=True) for t in draws)


def image_variance(images: Tensor) -> float:
    """Variance of the pixels around their channel's mean, averaged over channels."""
    return float(images.var((0, 2, 3), unbiased=False).mean())
