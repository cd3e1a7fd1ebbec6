"""Warming up the published augmenter: a UNet has to reproduce its input before it may change it."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from metaaug_cli.augmentation.augmenter import Augmenter, image_variance
from metaaug_cli.errors import InputError, MetaAugError
from metaaug_cli.files import cache_directory, write_atomically
from metaaug_cli.quantization.reconstruct import Tick

LARGEST_ERROR = 0.1
_RECIPE_VERSION = 1  # raise when the warm-up's arithmetic changes: cached ones are then not used
_RATE = 2e-3
_BATCH = 32
_LEAST_CROP = 0.5  # of the side
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmUp:
    """How well T reproduces the calibration images: mean (T(x) - x)^2 as a share of their variance."""

    error: float
    steps: int
    cached: bool


def warm_up(
    augmenter: Augmenter, images: Tensor, *, steps: int, seed: int, tick: Tick | None = None
) -> WarmUp:
    """Train ``augmenter.network`` to reproduce ``images`` (N, C, H, W) and random crops of them.

    A warm-up made earlier for the same images, shape, seed and steps is taken from the cache.

    Raises:
        MetaAugError: T has not learned the identity.
    """
    path = _cache_path(augmenter, images, steps, seed)
    cached = path is not None and _load(augmenter, path)
    if not cached:
        _train(augmenter, images, steps, seed, tick)
    augmenter.eval().requires_grad_(requires_grad=True)
    error = identity_error(augmenter, images)
    _logger.info("warm-up of the augmenter: error %.4f of the images' variance", error)
    if not error <= LARGEST_ERROR:  # so that nan stops the run too
        raise MetaAugError(
            f"the augmenter has not learned to reproduce its input: error {error:.3f} of the images' "
            f"variance after {steps} steps, at most {LARGEST_ERROR} is allowed",
            hint="raise metaaug.warmup_steps, or use metaaug.form=residual, which needs no warm-up",
        )
    if not cached and path is not None:
        _save(augmenter, path)
    return WarmUp(error, steps, cached)


@torch.no_grad()
def identity_error(augmenter: Augmenter, images: Tensor) -> float:
    """Mean (network(x) - x)^2 over the variance of the images, without the distance constraint."""
    device = augmenter.low.device
    total = 0.0
    for part in images.split(64):
        x = part.to(device)
        total += float((augmenter.network(x) - x).square().mean()) * len(part)
    return total / len(images) / max(image_variance(images), 1e-12)


def _train(augmenter: Augmenter, images: Tensor, steps: int, seed: int, tick: Tick | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    device = augmenter.low.device
    augmenter.train()
    optimizer = torch.optim.Adam(augmenter.network.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(steps):
        chosen = torch.randint(len(images), (min(_BATCH, 2 * len(images)),), generator=generator)
        x = _crops(images[chosen], generator).to(device)
        loss = (augmenter.network(x) - x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if tick is not None:
            tick(step + 1, steps)
    augmenter.eval()


def _crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the batch as it is, half cut out at one random place and size and resized."""
    half = len(images) // 2
    if half == 0:
        return images
    height, width = images.shape[2:]
    share, top, left = torch.rand(3, generator=generator).tolist()
    share = _LEAST_CROP + (1 - _LEAST_CROP) * share
    h, w = max(1, round(share * height)), max(1, round(share * width))
    y, x = round(top * (height - h)), round(left * (width - w))
    part = images[:half, :, y : y + h, x : x + w]
    part = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)
    return torch.cat([part, images[half:]])


def _cache_path(augmenter: Augmenter, images: Tensor, steps: int, seed: int) -> Path | None:
    folder = cache_directory()
    if folder is None:
        return None
    shapes = {name: list(value.shape) for name, value in augmenter.network.state_dict().items()}
    taught = [list(images.shape), hashlib.sha256(images.contiguous().numpy().data).hexdigest()]
    device = augmenter.low.device.type
    key = [_RECIPE_VERSION, augmenter.spec.form, shapes, taught, steps, seed, device, torch.__version__]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / "warmup" / f"{name}.safetensors"


def _load(augmenter: Augmenter, path: Path) -> bool:
    try:
        augmenter.network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _save(augmenter: Augmenter, path: Path) -> None:
    state = {name: value.cpu().contiguous() for name, value in augmenter.network.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(state))
    except (OSError, InputError) as error:
        _logger.warning("the warm-up is not kept for later runs: %s", error)
