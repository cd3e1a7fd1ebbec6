"""Whether a set of images suits a network: judged by what the network's batch norms remember.

The rules and limits are chosen by measurement; docs/guides/calibration-sets.md says what they miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.calibration.outliers import colourfulness
from metaaug_cli.calibration.preparations import Preparation, other_preparations
from metaaug_cli.calibration.set_statistics import (
    Distances,
    collect,
    distance_to_stored,
    standard_error,
    until,
)
from metaaug_cli.graph.bn_statistics import BatchNormProbe
from metaaug_cli.networks.preprocessing import Preprocessing

DISTANCE_LIMIT = 0.25
"""Distance over all layers, in stored standard deviations, beyond which images are too unlike."""

FIRST_LAYERS = 4
"""Batch norms that guesses about the preparation are tried on: they see the input before it is mixed."""

_TRIED_FIRST = 32
_TRIED_AGAIN = 4
_WORTH_FIXING = 0.05
_BETTER = 0.5
_CERTAIN = 1.64
_GREY_DISTANCE = 0.25
_GREY_SHARE = 0.5
_GREY_SPREAD = 2 / 255
_FEW_CLASSES = 0.5
_CHUNK = 64


@dataclass(frozen=True)
class Finding:
    """One reason why a set does not suit a model.

    Args:
        kind: ``preprocessing``, ``preparation``, ``grey``, ``domain`` or ``classes``.
        name: Which one of its kind; for a preparation the guess that fits better.
        text: What it is, completing "these images ...".
        remedy: What to do.
    """

    kind: str
    name: str
    text: str
    remedy: str


@dataclass(frozen=True)
class LayerDistance:
    """One batch norm: its module's path and the set's distance in stored standard deviations."""

    name: str
    distance: float


@dataclass(frozen=True)
class Check:
    """The verdict on a set.

    Args:
        sentence: The verdict in one sentence.
        findings: Why the set does not suit; the first is the most telling, none where it suits.
        distance: Over all layers, in stored standard deviations.
        layers: Per layer.
        images: How many images were looked at.
        grey_share: Fraction of them without colour; ``None`` for a grey network.
        classes: Effective number of classes the network predicts (exponential of the entropy); ``None``
            where its output is not one vector an image, or for fewer than 3 outputs or 2 images.
        classes_expected: As many different ones as that many random images would be expected to show.
    """

    sentence: str
    findings: tuple[Finding, ...]
    distance: float
    layers: tuple[LayerDistance, ...]
    images: int
    grey_share: float | None
    classes: float | None
    classes_expected: float | None

    @property
    def suits(self) -> bool:
        """Whether nothing was found against the set."""
        return not self.findings

    @property
    def advice(self) -> list[str]:
        """What to do, a line per finding; the first finding itself is in the sentence already."""
        return [
            finding.remedy if index == 0 else f"also, they {finding.text}: {finding.remedy}"
            for index, finding in enumerate(self.findings)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"suits": self.suits, **asdict(self), "limit": DISTANCE_LIMIT}


def check_calibration_set(
    calibration: CalibrationSet,
    probe: BatchNormProbe,
    *,
    model: str = "the model",
    expected: Preprocessing | None = None,
    num: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Judge whether images are like those a network was trained on.

    Args:
        calibration: The set, prepared.
        probe: The network.
        model: What to call it.
        expected: The preprocessing the model states, if it states one.
        num: Look at so many of the images at most, the first ones.
        progress: Called with (images done, images in all).

    Raises:
        InputError: The network computes NaN or infinite values of them.
    """
    images = calibration.images[:num]
    statistics = collect(probe.module, images, progress=progress)
    distances = distance_to_stored(statistics, probe.layers)
    grey = _grey_share(calibration, images)
    classes, different = _classes(statistics.outputs)
    stated = _preprocessing_finding(calibration, expected)
    seen = [
        *_grey_finding(grey, distances),
        *_preparation_findings(calibration, images, probe),
        *_domain_findings(distances),
    ]
    few = _class_findings(classes, different, len(images), statistics.outputs)
    # A ruined input collapses the predictions too; below the limit they can be believed, and explain colours.
    findings = [*stated, *seen, *few] if distances.overall > DISTANCE_LIMIT else [*stated, *few, *seen]
    names = [layer.name for layer in probe.layers]
    return Check(
        sentence=_sentence(findings, distances.overall, len(images), model),
        findings=tuple(findings),
        distance=distances.overall,
        layers=tuple(LayerDistance(*pair) for pair in zip(names, distances.layers, strict=True)),
        images=len(images),
        grey_share=grey,
        classes=classes,
        classes_expected=different,
    )


def _sentence(findings: list[Finding], distance: float, count: int, model: str) -> str:
    if not findings:
        return (
            f"These {count} images suit {model}: its layers see statistics {distance:.2f} standard deviations"
            f" from those of its training images (the limit is {DISTANCE_LIMIT})."
        )
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"These {count} images do not suit {model}: they {findings[0].text}{more}."


def _grey_share(calibration: CalibrationSet, images: Tensor) -> float | None:
    if calibration.preprocessing.channels != 3:
        return None
    spreads = [colourfulness(calibration.preprocessing.denormalise(c)) for c in images.split(_CHUNK)]
    return float((torch.cat(spreads) <= _GREY_SPREAD).float().mean())


def _preprocessing_finding(calibration: CalibrationSet, expected: Preprocessing | None) -> list[Finding]:
    differences = calibration.preprocessing.differences(expected) if expected is not None else []
    if not differences:
        return []
    text = f"were prepared for another model ({'; '.join(differences)})"
    return [Finding("preprocessing", "stated", text, "build the set again for this model")]


def _grey_finding(grey: float | None, distances: Distances) -> list[Finding]:
    """Grey images are wrong only for a network whose first layers remember colour."""
    if grey is None or grey < _GREY_SHARE:
        return []
    if _first(distances) < _GREY_DISTANCE:
        return []
    text = f"are grey ({grey:.0%} of them have no colour) where the model was trained on colour"
    return [Finding("grey", "grey", text, "use the colour images")]


def _first(distances: Distances) -> float:
    return float(distances.squared[:FIRST_LAYERS].mean().clamp(min=0).sqrt())


def _preparation_findings(
    calibration: CalibrationSet, images: Tensor, probe: BatchNormProbe
) -> list[Finding]:
    """The guess that brings the first layers closest to what they remember, if it is clearly better."""
    pixels = calibration.preprocessing.denormalise(images)
    guesses = other_preparations(calibration.preprocessing, float(pixels.min()), float(pixels.max()))
    first = until(probe, FIRST_LAYERS)

    def tried(changed: Tensor) -> Distances:
        return distance_to_stored(collect(first, changed), probe.layers)

    given = tried(images)
    if _first(given) < _WORTH_FIXING:
        return []
    # A few images tell which guesses are worth running all of them for.
    guesses.sort(key=lambda guess: float(tried(guess.change(images[:_TRIED_FIRST])).squared.mean()))
    found = [(tried(guess.change(images)), guess) for guess in guesses[:_TRIED_AGAIN]]
    best, guess = _simplest_of_the_best(found)
    return [_described(given, best, guess)] if _clearly_better(best, given) else []


def _simplest_of_the_best(found: list[tuple[Distances, Preparation]]) -> tuple[Distances, Preparation]:
    """The best guess, or one of fewer mistakes that chance may have put behind it."""
    best = min(found, key=lambda pair: float(pair[0].squared.mean()))
    alike = [
        pair
        for pair in found
        if pair is best or _gain(pair[0], best[0]) <= _CERTAIN * _gain_error(pair[0], best[0])
    ]
    return min(alike, key=lambda pair: (pair[1].mistakes, float(pair[0].squared.mean())))


def _clearly_better(best: Distances, given: Distances) -> bool:
    """Half the squared distance or less, and by more than chance between the images would give."""
    limit = _BETTER * float(given.squared.mean())
    return float(best.squared.mean()) < limit and _gain(given, best) > _CERTAIN * _gain_error(given, best)


def _gain(worse: Distances, better: Distances) -> float:
    return float((worse.squared - better.squared).mean())


def _gain_error(worse: Distances, better: Distances) -> float:
    assert worse.jackknife is not None
    assert better.jackknife is not None
    return standard_error((worse.jackknife - better.jackknife).mean(1))


def _described(given: Distances, best: Distances, guess: Preparation) -> Finding:
    text = f"{guess.finding} (distance in the first layers {_first(given):.2f}, otherwise {_first(best):.2f})"
    return Finding("preparation", guess.name, text, guess.remedy)


def _domain_findings(distances: Distances) -> list[Finding]:
    if not distances.overall > DISTANCE_LIMIT:
        return []
    text = (
        f"are unlike the ones it was trained on (distance {distances.overall:.2f} standard deviations,"
        f" the limit is {DISTANCE_LIMIT})"
    )
    remedy = "check size, crop and normalisation, and use images of the kind the model was trained on"
    return [Finding("domain", "distance", text, remedy)]


def _classes(outputs: Tensor) -> tuple[float | None, float | None]:
    """Effective number of predicted classes, and how many different ones chance would give."""
    if outputs.dim() != 2 or outputs.shape[1] < 3 or len(outputs) < 2:
        return None, None
    count, classes = outputs.shape
    shares = torch.bincount(outputs.argmax(1), minlength=classes).double() / count
    shares = shares[shares > 0]
    effective = float(torch.exp(-(shares * shares.log()).sum()))
    return effective, classes * (1 - (1 - 1 / classes) ** count)


def _class_findings(
    classes: float | None, expected: float | None, count: int, outputs: Tensor
) -> list[Finding]:
    if classes is None or expected is None or classes >= _FEW_CLASSES * expected:
        return []
    text = (
        f"cover too few classes (the model sees about {classes:.0f} of its {outputs.shape[1]} in them;"
        f" {count} images of all kinds would show about {expected:.0f})"
    )
    return [Finding("classes", "few", text, "add images of the other classes the model will meet")]
