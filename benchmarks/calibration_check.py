"""Sensitivity table of docs/guides/calibration-sets.md: ``python benchmarks/calibration_check.py NAME...``.

Builds honest and spoilt calibration sets for resnet20 or mobilenet, lets the check of ``metaaug calibrate
inspect`` judge each, and appends what it found to benchmarks/results/calibration_check.jsonl; finished cases
are not repeated. Honest sets are drawn from the calibration folder and from the evaluation folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from common import MOBILENET, RESNET20, SHARED, is_recorded, record
from torch import Tensor
from torch.nn.functional import avg_pool2d

from metaaug_cli.calibration.check import check_calibration_set
from metaaug_cli.calibration.data import CalibrationSet, load_calibration_set, make_calibration_set
from metaaug_cli.graph.bn_statistics import BatchNormProbe, batch_norm_probe
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing

NAME = "calibration_check"
_MANY, _FEW_SEEDS = 1024, 2

Pixels = Callable[[Tensor], Tensor]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Case:
    """A network and where its images are."""

    model: LoadedModel
    data: Path
    test: str
    other: Path
    sizes: tuple[int, ...]
    seeds: tuple[int, int]  # of honest and of spoilt sets


def resnet20() -> Case:
    """ResNet-20 and CIFAR-10."""
    other = SHARED / "data/imagenet/calib"
    return Case(RESNET20.load(), SHARED / "data/cifar10", "test", other, (32, 128, 256, 1024), (20, 5))


def mobilenet() -> Case:
    """MobileNet-V1 0.75 and ImageNet."""
    other = SHARED / "data/cifar10/calib"
    return Case(MOBILENET.load(), SHARED / "data/imagenet", "val", other, (32, 128), (5, 2))


CASES = {"resnet20": resnet20, "mobilenet": mobilenet}


def _grey(pixels: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(1, keepdim=True).expand_as(pixels)


def _blur(pixels: Tensor) -> Tensor:
    return avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)


def _noise(pixels: Tensor) -> Tensor:
    return torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))


SPOILT_PIXELS: dict[str, Pixels] = {
    "BGR": lambda x: x.flip(1),
    "grey": _grey,
    "negatives": lambda x: 1 - x,
    "upside down": lambda x: x.flip(2),
    "turned by 90 degrees": lambda x: x.transpose(2, 3),
    "blurred (5x5 mean)": _blur,
    "darkened to 40 %": lambda x: x * 0.4,
    "uniform noise": _noise,
}


def spoilt(case: Case, kind: str, num: int, seed: int) -> CalibrationSet:
    """One set, honest or not."""
    preprocessing = case.model.preprocessing
    if kind == "one class" or kind == "three classes":
        return _few_classes(case, 1 if kind == "one class" else 3, num, seed)
    if kind == "the other data set":
        resized = replace(preprocessing, resize="auto" if preprocessing.size[0] > 32 else 32)
        drawn = load_calibration_set(case.other, preprocessing=resized, num=num, seed=seed)
        return make_calibration_set(drawn.images, preprocessing, drawn.sources)
    folder = case.data / (case.test if kind == "honest, evaluation images" else "calib")
    drawn = load_calibration_set(folder, preprocessing=preprocessing, num=num, seed=seed)
    if kind.startswith("honest"):
        return drawn
    pixels = preprocessing.denormalise(drawn.images)
    if kind in SPOILT_PIXELS:
        return _stated(SPOILT_PIXELS[kind](pixels), preprocessing, drawn)
    if kind == "0 to 255, unscaled, stored":
        return make_calibration_set(pixels * 255, preprocessing, drawn.sources)
    if kind == "[0, 1], unnormalised, stored":
        return make_calibration_set(pixels, preprocessing, drawn.sources)
    flags = {
        "0 to 255 by flags": ((0.0,) * 3, (1 / 255,) * 3),
        "ImageNet normalisation by flags": IMAGENET,
        "[-1, 1] normalisation by flags": HALF,
        "CIFAR-10 normalisation by flags": CIFAR,
    }
    mean, std = flags[kind]
    return _stated(pixels, replace(preprocessing, mean=mean, std=std), drawn)


def _stated(pixels: Tensor, preprocessing: Preprocessing, drawn: CalibrationSet) -> CalibrationSet:
    images = preprocessing.normalise(pixels.mul(255).round())
    return make_calibration_set(images, preprocessing, drawn.sources)


def _few_classes(case: Case, count: int, num: int, seed: int) -> CalibrationSet:
    """Images of the first classes that a seeded draw meets; ImageNet's folder has one image of each."""
    everything = load_calibration_set(
        case.data / "calib", preprocessing=case.model.preprocessing, num=1280, seed=seed
    )
    labels = [source.split("/")[0] for source in everything.sources]
    chosen = list(dict.fromkeys(labels))[:count]
    kept = [index for index, label in enumerate(labels) if label in chosen][:num]
    sources = [everything.sources[index] for index in kept]
    return make_calibration_set(everything.images[kept], case.model.preprocessing, sources)


def kinds(name: str) -> list[str]:
    """What is tried on a network, most telling first."""
    own = "[-1, 1] normalisation by flags" if name == "mobilenet" else "CIFAR-10 normalisation by flags"
    found = ["honest, calibration images", "honest, evaluation images", "BGR"]
    flags = ["ImageNet", "[-1, 1]", "CIFAR-10"]
    found += [kind for flag in flags if (kind := f"{flag} normalisation by flags") != own]
    found += ["grey", "0 to 255 by flags", "0 to 255, unscaled, stored", "[0, 1], unnormalised, stored"]
    found += ["the other data set", *(kind for kind in SPOILT_PIXELS if kind not in found)]
    return found if name == "mobilenet" else [*found, "one class", "three classes"]


def run(name: str) -> None:
    """Judge every set that is not recorded yet."""
    case = CASES[name]()
    probe = batch_norm_probe(case.model.module, (3, *case.model.preprocessing.size))
    for num, seed, kind in product(case.sizes, range(max(case.seeds)), kinds(name)):
        key = {"model": name, "kind": kind, "num": num, "seed": seed}
        seeds = _FEW_SEEDS if num >= _MANY else case.seeds[0 if kind.startswith("honest") else 1]
        if seed < seeds and not is_recorded(NAME, key):
            _judge(case, probe, key)


def _judge(case: Case, probe: BatchNormProbe, key: dict[str, object]) -> None:
    calibration = spoilt(case, str(key["kind"]), int(str(key["num"])), int(str(key["seed"])))
    check = check_calibration_set(calibration, probe, num=int(str(key["num"])))
    found = [f"{finding.kind}: {finding.name}" for finding in check.findings]
    record(NAME, key, {"images": check.images, "distance": round(check.distance, 4), "findings": found})
    print(key, round(check.distance, 3), found, flush=True)


def main() -> None:
    """Run the named networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=CASES)
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        run(name)


if __name__ == "__main__":
    main()
