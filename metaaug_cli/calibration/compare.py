"""Two calibration sets side by side, in the statistics that a network's batch norms see of them.

The yardstick is the distance between two halves of the first set at the same number of images: whatever is
not beyond it may be chance. A distance says nothing about accuracy, and none is predicted from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.calibration.set_statistics import (
    SetStatistics,
    collect,
    distance_between,
    distance_to_stored,
)
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.graph.bn_statistics import BatchNormProbe

SPLITS = 20
"""Random halvings of the first set; the distances between sets and between halves are averaged over them."""

_FEWEST = 4


@dataclass(frozen=True)
class LayerComparison:
    """One batch norm.

    Args:
        name: Path of its module.
        distance: Between the two sets, in stored standard deviations.
        halves: Between two halves of the first set, at the same number of images.
    """

    name: str
    distance: float
    halves: float


@dataclass(frozen=True)
class Comparison:
    """How far two sets are apart.

    Args:
        sentence: The outcome in one sentence.
        distance: Between the sets, over all layers, in stored standard deviations.
        halves: Between two halves of the first set.
        farther: In how many of ``splits`` halvings the sets were farther apart than the halves.
        splits: Number of random halvings.
        images: Images on each side of every distance but the next two, which take all images of their set.
        first_to_stored: Distance of the first set from the network's training images, chance taken off.
        second_to_stored: Likewise of the second.
        layers: Per layer, in execution order.
    """

    sentence: str
    distance: float
    halves: float
    farther: int
    splits: int
    images: int
    first_to_stored: float
    second_to_stored: float
    layers: tuple[LayerComparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def compare_sets(
    first: CalibrationSet,
    second: CalibrationSet,
    probe: BatchNormProbe,
    *,
    names: tuple[str, str] = ("A", "B"),
    num: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure how far two sets are apart for a network.

    Args:
        first: The set that the yardstick is taken from.
        second: The set compared with it.
        probe: The network.
        names: What to call the sets.
        num: Look at so many images of each at most, the first ones.
        seed: Of the random halvings.
        progress: Called with (images done, images in all).

    Raises:
        InputError: The images of the sets differ in size, or the network computes NaN or infinite values.
        UsageError: Too few images to halve.
    """
    images = first.images[:num], second.images[:num]
    if images[0].shape[1:] != images[1].shape[1:]:
        sizes = " and ".join("x".join(map(str, part.shape[1:])) for part in images)
        raise InputError(f"the images of the sets have different sizes (channels x height x width): {sizes}")
    side = min(len(images[0]) // 2, len(images[1]))
    if side < _FEWEST:
        raise UsageError(
            f"{names[0]} has {len(images[0])} images and {names[1]} {len(images[1])}: too few to compare",
            hint=f"at least {2 * _FEWEST} of {names[0]} and {_FEWEST} of {names[1]} are needed",
        )
    total = len(images[0]) + len(images[1])

    def shown(offset: int) -> Callable[[int, int], None]:
        return lambda done, _: progress(offset + done, total) if progress is not None else None

    a = collect(probe.module, images[0], progress=shown(0))
    b = collect(probe.module, images[1], progress=shown(len(images[0])))
    return _compared(a, b, probe, names, side, seed)


def _compared(
    a: SetStatistics, b: SetStatistics, probe: BatchNormProbe, names: tuple[str, str], side: int, seed: int
) -> Comparison:
    generator = torch.Generator().manual_seed(seed)
    apart, halves = [], []
    for _ in range(SPLITS):
        order = torch.randperm(len(a), generator=generator)
        half = a.of(order[:side])
        other = b.of(torch.randperm(len(b), generator=generator)[:side])
        halves.append(distance_between(half, a.of(order[side : 2 * side]), probe.layers).squared)
        apart.append(distance_between(half, other, probe.layers).squared)
    between, within = torch.stack(apart), torch.stack(halves)
    distance, yardstick = (float(part.mean().sqrt()) for part in (between, within))
    farther = int((between.mean(1) > within.mean(1)).sum())
    per_layer = zip(probe.layers, between.mean(0).sqrt(), within.mean(0).sqrt(), strict=True)
    return Comparison(
        sentence=_sentence(names, distance, yardstick, farther, side),
        distance=distance,
        halves=yardstick,
        farther=farther,
        splits=SPLITS,
        images=side,
        first_to_stored=distance_to_stored(a, probe.layers).overall,
        second_to_stored=distance_to_stored(b, probe.layers).overall,
        layers=tuple(LayerComparison(layer.name, float(d), float(h)) for layer, d, h in per_layer),
    )


def _sentence(names: tuple[str, str], distance: float, halves: float, farther: int, side: int) -> str:
    first, second = names
    times = f"{distance / halves:.1f} times as far as" if halves > 0 else "unlike"
    return (
        f"{first} and {second} are {distance:.3f} standard deviations apart, {times} two halves of {first}"
        f" ({halves:.3f}; {side} images a side, farther in {farther} of {SPLITS} random halvings)."
    )
