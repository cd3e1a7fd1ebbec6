"""Other ways in which images may have been meant: swapped channels, another normalisation, negatives.

Each is a guess that can be tried: if the network's first layers find the changed images much closer to what
they were trained on, the guess is likely right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaaug_cli.networks.preprocessing import Preprocessing

_COLOUR = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "the [-1, 1] scale's": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "the [0, 1] scale's": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "the unscaled 0 to 255 pixels'": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "the 0 to 255 pixels' without their ImageNet mean": ((0.485, 0.456, 0.406), (1 / 255, 1 / 255, 1 / 255)),
}
_GREY = {
    "MNIST's": ((0.1307,), (0.3081,)),
    "the [-1, 1] scale's": ((0.5,), (0.5,)),
    "the [0, 1] scale's": ((0.0,), (1.0,)),
    "the unscaled 0 to 255 pixels'": ((0.0,), (1 / 255,)),
}
_SLACK = 0.02
_SLIVER = 0.1
_ALIKE = 0.02

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preparation:
    """One guess about what went wrong.

    Args:
        name: Short and stable, for machines.
        finding: What it would mean, completing "these images ...".
        remedy: What to do about it.
        change: Maps the set's images (N, C, H, W) to those the guess says are right.
        mistakes: How many mistakes it takes to explain the set by.
    """

    name: str
    finding: str
    remedy: str
    change: Change
    mistakes: int = 1


def other_preparations(preprocessing: Preprocessing, low: float, high: float) -> list[Preparation]:
    """The guesses worth trying for a set.

    Args:
        preprocessing: What the set says made it.
        low: Its smallest pixel on the [0, 1] scale, as that preprocessing implies.
        high: Its largest pixel likewise.
    """
    impossible = low < -_SLACK or high > 1 + _SLACK
    found = _scalings(preprocessing) if impossible or low > _SLIVER or high < 1 - _SLIVER else []
    if impossible:
        return found  # nothing else can be said of pixels that are no pixels
    guesses = _renormalised(preprocessing)
    if preprocessing.channels == 3:
        guesses = [_swapped(preprocessing), *guesses, *(_after_swap(preprocessing, g) for g in guesses)]
    return [*found, *guesses, _negative(preprocessing)]


def _negative(preprocessing: Preprocessing) -> Preparation:
    return Preparation(
        "negative",
        "look like negatives (light and dark exchanged)",
        "invert the image files, or use images like those the model was trained on",
        lambda images: _given(preprocessing, 1 - preprocessing.denormalise(images)),
    )


def _swapped(preprocessing: Preprocessing) -> Preparation:
    return Preparation(
        "bgr",
        "look like BGR where the model expects RGB",
        "swap red and blue, where the files were written or in the network's own code",
        lambda images: _given(preprocessing, preprocessing.denormalise(images).flip(1)),
    )


def _given(preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    """Normalise pixels that are on the [0, 1] scale already, as the set says."""
    return _normalise(pixels, preprocessing.mean, preprocessing.std)


def _renormalised(preprocessing: Preprocessing) -> list[Preparation]:
    known = _COLOUR if preprocessing.channels == 3 else _GREY
    return [
        Preparation(
            f"normalisation {_listed(mean)} / {_listed(std)}",
            f"are normalised with mean {_listed(preprocessing.mean)} and std {_listed(preprocessing.std)}"
            f" where the model seems to expect {name} mean {_listed(mean)} and std {_listed(std)}",
            f"pass --mean {_listed(mean, ',')} --std {_listed(std, ',')}",
            lambda images, mean=mean, std=std: _normalise(preprocessing.denormalise(images), mean, std),  # type: ignore[misc]
        )
        for name, (mean, std) in known.items()
        if not _alike(preprocessing, mean, std)
    ]


def _scalings(preprocessing: Preprocessing) -> list[Preparation]:
    """What stored values outside the pixel range, or in a part of it, may have been."""
    found = []
    remedy = "build the set from the image files with metaaug calibrate"
    scaled = {
        "pixels 0 to 255": ("hold 0 to 255 pixels that were never scaled to 0 to 1", lambda x: x / 255),
        "pixels 0 to 1": ("hold 0 to 1 pixels that were never normalised", lambda x: x),
        "normalised pixels 0 to 255": (
            "were normalised without scaling their 0 to 255 pixels to 0 to 1",
            lambda x: preprocessing.denormalise(x) / 255,
        ),
        "pixels divided twice": (
            "hold pixels that were divided by 255 twice",
            lambda x: preprocessing.denormalise(x) * 255,
        ),
        "pixels normalised twice": (
            "were normalised twice",
            lambda x: preprocessing.denormalise(preprocessing.denormalise(x)),
        ),
    }
    known = _COLOUR if preprocessing.channels == 3 else _GREY
    for name, (mean, std) in known.items():
        if any(mean) and not _alike(preprocessing, mean, std):
            finding = f"were normalised with {name} mean and std, not with the ones they state"
            scaled[f"normalised by {_listed(mean)} / {_listed(std)}"] = (finding, _undo(mean, std))
    for name, (finding, to_pixels) in scaled.items():
        found.append(Preparation(name, finding, remedy, _through(preprocessing, to_pixels)))
    return found


def _through(preprocessing: Preprocessing, to_pixels: Change) -> Change:
    return lambda images: _given(preprocessing, to_pixels(images))


def _undo(mean: tuple[float, ...], std: tuple[float, ...]) -> Change:
    return lambda images: images * _column(std) + _column(mean)


def _after_swap(preprocessing: Preprocessing, guess: Preparation) -> Preparation:
    swap = _swapped(preprocessing)
    return Preparation(
        f"bgr, {guess.name}",
        f"{swap.finding}, and {guess.finding}",
        f"{swap.remedy}, and {guess.remedy}",
        lambda images: guess.change(swap.change(images)),
        mistakes=2,
    )


def _normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - _column(mean)) / _column(std)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def _alike(preprocessing: Preprocessing, mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    pairs = [*zip(preprocessing.mean, mean, strict=True), *zip(preprocessing.std, std, strict=True)]
    return all(abs(a - b) <= _ALIKE * max(abs(b), 0.01) for a, b in pairs)


def _listed(values: tuple[float, ...], separator: str = " ") -> str:
    return separator.join(f"{value:.4g}" for value in values)
