"""What the learned augmenter is worth: ``python benchmarks/metaaug.py SUITE [SUITE ...]``.

All variants of a suite see the same calibration sets (seed = set) and are evaluated in ONNX Runtime on the
same test images, so that differences are paired. Suites: main (32 images, every variant, 500 iterations),
images (8 to 512 images, W2A2 and W2A4, 200 iterations, also with images made from the network beside
them), published (32 images, the second layer's input at 8 bits, as in the published code and by default),
long (the same with 2 000 iterations), default (as published, learned from second-order rounding, 8 to 512
images, 200 iterations), fixed-kinds (every fixed augmentation there, 32 images), as-released (the released
code's settings in full at its own rates, for a GPU), ablation (weights, preservation, inner steps, epsilon),
mobilenet (64 and 512 images of 224 px, 60 iterations), mobilenet-128 (the same at 128 px with 200, and W2A4
with 2 000), mobilenet-default and mobilenet-128-default (both from second-order rounding), mobilenet-few
(128 px, 32 images), mobilenet-long (at 224 px with 500, for a GPU). Finished runs are kept in
benchmarks/results/metaaug.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import (
    Subject,
    bit_settings,
    is_recorded,
    mobilenet,
    mobilenet_128,
    onnx_scores,
    quantized,
    record,
    resnet20,
)
from data_free import stored_set

from metaaug_cli.calibration.data import join_calibration_sets, load_calibration_set, save_calibration_set
from metaaug_cli.recipe.config import load_recipe

Key = dict[str, Any]
_SETS = range(5)
_ITERATIONS = 500
_SHORT = 200
_LONG = 2_000
_RELEASED_SHORT, _RELEASED_LONG = 5_000, 20_000  # both at the published rates
_SYNTHETIC = "genie, 256 synthetic images too"
_SYNTHETIC_64 = "genie, 64 synthetic images too"
_BOTH = "policy, 256 synthetic images too"
_PLAIN, _PLAIN_BOTH, _PLAIN_64 = (
    "genie, 256 images from plain noise too",
    "policy, 256 images from plain noise too",
    "genie, 64 images from plain noise too",
)
_REAL_512 = "genie, 512 real images instead"
_THRICE = "genie, three times the iterations"  # the time of learned copies
_TRIVIAL = "policy+trivial-geometric"  # the paper's best setting
_RELEASED = "unet as released"
_COMBINED = _POLICY_POOL, _POOL_BOTH, _POLICY_POOL_BOTH = (
    "policy+pool",
    "pool, 256 synthetic images too",
    "policy+pool, 256 synthetic images too",
)
# What stands beside the real images: where they come from (see data_free.py), and how many.
_MADE = dict.fromkeys((_SYNTHETIC, _BOTH, _POOL_BOTH, _POLICY_POOL_BOTH), ("dgh", 256))
_MADE |= {_SYNTHETIC_64: ("dgh", 64)}
_MADE |= {p: ("dgh from plain noise", n) for p, n in ((_PLAIN, 256), (_PLAIN_BOTH, 256), (_PLAIN_64, 64))}
_SMALL = ["metaaug.batch_size=16", "metaaug.val_batch_size=32"]
_POLICY = ["metaaug.form=policy", "metaaug.steps=50", "metaaug.base_width=16", *_SMALL]
_RESIDUAL = ["metaaug.form=residual", "metaaug.steps=40", "metaaug.base_width=8", *_SMALL]
_POOL = "flip+crop+geometric+mixup"
_LEARNED = "augmentation.kind=metaaug"
_VALIDATION_OFF = "metaaug.val_weight=0"

VARIANTS: dict[str, list[str]] = {
    "genie": ["augmentation.kind=none"],
    "pool": [f"augmentation.kind={_POOL}"],
    "policy": [_LEARNED, *_POLICY],
    "policy, validation off": [_LEARNED, *_POLICY, _VALIDATION_OFF],
    _SYNTHETIC: ["augmentation.kind=none"],
    _BOTH: [_LEARNED, *_POLICY],
    _PLAIN: ["augmentation.kind=none"],
    _PLAIN_BOTH: [_LEARNED, *_POLICY],
    _REAL_512: ["augmentation.kind=none"],
    "genie, twice the iterations": ["augmentation.kind=none"],
    _THRICE: ["augmentation.kind=none"],
    _POLICY_POOL: [f"{_LEARNED}+{_POOL}", *_POLICY],
    _POOL_BOTH: [f"augmentation.kind={_POOL}"],
    _POLICY_POOL_BOTH: [f"{_LEARNED}+{_POOL}", *_POLICY],
    _TRIVIAL: [f"{_LEARNED}+trivial-geometric", *_POLICY],
    "unet": [_LEARNED, "metaaug.form=unet", "metaaug.steps=50", "metaaug.base_width=16", *_SMALL],
    "residual": [_LEARNED, *_RESIDUAL],
    "residual, validation off": [_LEARNED, *_RESIDUAL, _VALIDATION_OFF],
}


def _key(variant: str, *, bits: str = "w2a2", num: int = 32, seed: int, iterations: int = _ITERATIONS) -> Key:
    iterations *= {"genie, twice the iterations": 2, _THRICE: 3}.get(variant, 1)
    if variant == _REAL_512:
        num = 512
    return {"variant": variant, "bits": bits, "num": num, "seed": seed, "iterations": iterations}


def _published(keys: list[Key]) -> list[Key]:
    """With the second layer's input at 8 bits, where the published code has it."""
    return [{**key, "stem": 8} for key in keys]


def main_table() -> list[Key]:
    """W2A2, 32 images: every claim that needs five paired calibration sets, the most telling first."""
    elsewhere = (_REAL_512, _THRICE, _TRIVIAL, "unet", *_COMBINED)
    return [_key(variant, seed=seed) for variant in VARIANTS if variant not in elsewhere for seed in _SETS]


def published() -> list[Key]:
    """W2A2, 32 images in the published code's placement, and what 512 real images would gain."""
    variants = ("genie", "policy", "mixup", "pool", _SYNTHETIC, _REAL_512)
    each = [(seed, v) for found in (variants, _COMBINED) for seed in _SETS for v in found]
    return _published([_key(variant, seed=seed) for seed, variant in each])


def long() -> list[Key]:
    """The same nearer to the published length: does overfitting grow with it, and do copies help then?"""
    variants = ("genie", "policy", "mixup", _SYNTHETIC, _REAL_512)
    return _published([_key(v, seed=seed, iterations=_LONG) for seed in _SETS[:3] for v in variants])


def by_default() -> list[Key]:
    """The default start and placement, from few images to many: does anything still help a better start?"""
    every = ("genie", "policy", _SYNTHETIC, "pool", "genie, twice the iterations", "mixup", _POLICY_POOL)
    terms = (_THRICE, "policy, validation off", "residual", "residual, validation off", "policy, inner sgd")
    cells = [("w2a2", 32, (*every, *terms, _TRIVIAL, "unet")), ("w2a4", 32, every[:4])]
    cells += [("w2a2", num, every[:4]) for num in (64, 128)]
    cells += [("w2a2", 8, (*every[:3], "pool")), ("w2a2", 512, every[:2]), ("w2a2", 256, every[:2])]
    cells += [("w2a4", num, every[:2]) for num in (64, 512, 128, 256)]
    return _by_default(
        _key(v, bits=bits, num=num, seed=seed, iterations=_SHORT)
        for bits, num, variants in cells
        for seed in _SETS
        for v in variants
    )


def fixed_kinds() -> list[Key]:
    """Every fixed augmentation by default, 32 images."""
    kinds = ("genie", *FIXED)
    return _by_default(_key(kind, seed=seed, iterations=_SHORT) for seed in _SETS for kind in kinds)


def as_released() -> list[Key]:
    """MetaAug as released against plain learning, long enough for the published rates; set by set."""
    lengths = (_RELEASED_SHORT, _RELEASED_LONG)
    each = [(n, seed, v) for n in lengths for seed in _SETS for v in ("genie", _RELEASED)]
    return _published([_key(v, seed=seed, iterations=n) for n, seed, v in each])


def _by_default(keys: Iterable[Key]) -> list[Key]:
    return [{**key, "start": "second-order"} for key in _published(list(keys))]


def joined(subject: Subject, key: Key, folder: Path) -> Subject:
    """The subject with images made from its network beside the key's real ones."""
    preprocessing, seed = subject.model.preprocessing, key["seed"]
    real = load_calibration_set(subject.calib, preprocessing=preprocessing, num=key["num"], seed=seed)
    made = load_calibration_set(stored_set(subject, *_MADE[key["variant"]], seed))
    save_calibration_set(join_calibration_sets(real, made), folder / "joined.safetensors")
    return replace(subject, calib=folder / "joined.safetensors")


def images() -> list[Key]:
    """From few images to many (the paper's Table A.8); set by set, so that all rows fill evenly."""
    few, usual = ("genie", "policy", _SYNTHETIC, _PLAIN), ("genie", "policy")
    telling = [
        ("w2a2", 32, few),
        ("w2a2", 512, usual),
        ("w2a2", 8, ("genie", "pool", "policy", _SYNTHETIC, _PLAIN)),
        ("w2a4", 32, few),
        ("w2a2", 128, few),
        ("w2a4", 512, usual),
    ]
    between = [("w2a2", 64, usual), ("w2a2", 256, usual)]
    between += [("w2a4", num, usual) for num in (64, 128, 256)]
    return [
        _key(variant, bits=bits, num=num, seed=seed, iterations=_SHORT)
        for cells in (telling, between)
        for seed in _SETS
        for bits, num, variants in cells
        for variant in variants
    ]


def ablation() -> list[Key]:
    """One change at a time, set by set: weights, preservation, epsilon, inner steps."""
    reference = ["residual", "policy, validation off", *ABLATION]
    return [_key(variant, seed=seed, iterations=_SHORT) for seed in _SETS[:3] for variant in reference]


def mobilenet_keys() -> list[Key]:
    """224 px: one calibration set, 60 iterations, few images first."""
    cells = [("w4a4", 64), ("w2a4", 64), ("w4a4", 512), ("w2a4", 512)]
    return [
        _key(variant, bits=bits, num=num, seed=0, iterations=60)
        for bits, num in cells
        for variant in MOBILENET_VARIANTS
        if variant != _POLICY_20 and (num == 64 or variant not in (_SYNTHETIC_64, _PLAIN_64))
    ]


def mobilenet_long_keys() -> list[Key]:
    """224 px with schedules that learn something at 2 bits too: minutes on a GPU, hours on a CPU."""
    cells = [("w4a4", 64), ("w2a4", 64), ("w4a4", 512), ("w2a4", 512)]
    return [
        _key(variant, bits=bits, num=num, seed=0, iterations=_ITERATIONS)
        for bits, num in cells
        for variant in ("genie", _POLICY_20)
    ]


def mobilenet_128_keys() -> list[Key]:
    """128 px, where a CPU can afford three calibration sets and 200 iterations; set by set."""
    usual = ("genie", _POLICY_10)
    four = [
        _key(variant, bits="w4a4", num=num, seed=seed, iterations=_SHORT)
        for seed in range(3)
        for num, variants in ((64, (*usual, _SYNTHETIC_64)), (512, usual))
        for variant in variants
    ]
    two = [(num, variant) for num in (64, 512) for variant in usual]
    return four + [_key(variant, bits="w2a4", num=num, seed=0, iterations=_LONG) for num, variant in two]


def mobilenet_default_keys() -> list[Key]:
    """224 px, the default start and placement of the first layer's output: many images and few."""
    cells = [("w4a4", 0), ("w2a4", 0), ("w4a4", 1), ("w4a4", 2)]
    return _by_default(
        _key(variant, bits=bits, num=num, seed=seed, iterations=60)
        for bits, seed in cells
        for num in (512, 64)
        for variant in ("genie", _POLICY_10)
    )


def mobilenet_128_default_keys() -> list[Key]:
    """The same at 128 px with longer schedules; set by set."""
    return _by_default(
        _key(variant, bits="w4a4", num=num, seed=seed, iterations=_SHORT)
        for seed in range(3)
        for num in (64, 512)
        for variant in ("genie", _POLICY_10)
    )


def mobilenet_few_keys() -> list[Key]:
    """128 px and 32 images, the paper's hardest case: what is natural to the network, and what is learned."""
    variants = ("genie", "flip+crop", "mixup", _POLICY_FEW, f"{_POLICY_FEW}, flip+crop on top", _SYNTHETIC_64)
    return [
        _key(variant, bits="w4a4", num=32, seed=seed, iterations=_SHORT)
        for seed in range(3)
        for variant in variants
    ]


FIXED = {
    kind: [f"augmentation.kind={kind}"]
    for kind in (
        "trivial-geometric", "geometric", "mixup", "cutmix", "photometric", "rand-geometric", "flip",
        "rotate", "brightness", "contrast", "trivial", "trivial-photometric", "rand", "rand-photometric",
    )
}  # fmt: skip
ABLATION = {
    "policy, lambda 1 = 1": [_LEARNED, *_POLICY, "metaaug.val_weight=1"],
    "policy, lambda 1 = 25": [_LEARNED, *_POLICY, "metaaug.val_weight=25"],
    "policy, preserve kl": [_LEARNED, *_POLICY, "metaaug.preservation=kl"],
    "policy, preserve mse": [_LEARNED, *_POLICY, "metaaug.preservation=mse"],
    "policy, preserve off": [_LEARNED, *_POLICY, "metaaug.preserve_weight=0"],
    "policy, inner sgd": [_LEARNED, *_POLICY, "metaaug.inner=sgd"],
    "policy, inner adam-fresh": [_LEARNED, *_POLICY, "metaaug.inner=adam-fresh"],
    "policy, walk of 20 inner steps": [_LEARNED, *_POLICY, "metaaug.restart_every=20"],
    "policy, epsilon 0.1": [_LEARNED, *_POLICY, "metaaug.epsilon=0.1"],
    "policy, epsilon 1": [_LEARNED, *_POLICY, "metaaug.epsilon=1"],
    "residual, epsilon 0.1": [_LEARNED, *_RESIDUAL, "metaaug.epsilon=0.1"],
    "residual, epsilon 0.03": [_LEARNED, *_RESIDUAL, "metaaug.epsilon=0.03"],
}
_LARGE = ["metaaug.form=policy", "metaaug.steps=10", "metaaug.batch_size=8", "metaaug.val_batch_size=16"]
_POLICY_10, _POLICY_20 = (f"policy, {steps} outer steps, 2 copies" for steps in (10, 20))
MOBILENET_VARIANTS = {
    "genie": ["augmentation.kind=none"],
    _POLICY_10: [_LEARNED, *_LARGE, "augmentation.copies=2"],
    _SYNTHETIC_64: ["augmentation.kind=none"],
    _PLAIN_64: ["augmentation.kind=none"],
    _POLICY_20: [_LEARNED, *_POLICY, "metaaug.steps=20", "augmentation.copies=2"],
}
_POLICY_FEW = "policy, 10 outer steps"
FEW_VARIANTS = {
    "flip+crop": ["augmentation.kind=flip+crop"],
    _POLICY_FEW: [_LEARNED, *_LARGE],
    f"{_POLICY_FEW}, flip+crop on top": [f"{_LEARNED}+flip+crop", *_LARGE],
}
_AS_RELEASED = load_recipe("w2a2-metaaug-published").metaaug.model_dump()
RELEASED = {_RELEASED: [_LEARNED, *(f"metaaug.{name}={value}" for name, value in _AS_RELEASED.items())]}
_CHANGES = VARIANTS | ABLATION | FIXED | MOBILENET_VARIANTS | FEW_VARIANTS | RELEASED

SUITES: dict[str, tuple[Callable[[], Subject], Callable[[], list[Key]]]] = {
    "main": (resnet20, main_table),
    "images": (resnet20, images),
    "published": (resnet20, published),
    "long": (resnet20, long),
    "default": (resnet20, by_default),
    "fixed-kinds": (resnet20, fixed_kinds),
    "as-released": (resnet20, as_released),
    "ablation": (resnet20, ablation),
    "mobilenet": (mobilenet, mobilenet_keys),
    "mobilenet-128": (mobilenet_128, mobilenet_128_keys),
    "mobilenet-default": (mobilenet, mobilenet_default_keys),
    "mobilenet-128-default": (mobilenet_128, mobilenet_128_default_keys),
    "mobilenet-few": (mobilenet_128, mobilenet_few_keys),
    "mobilenet-long": (mobilenet, mobilenet_long_keys),
}


def settings(key: Key) -> list[str]:
    """Recipe settings of one run."""
    return [
        *bit_settings(key["bits"]),
        "quantization.placement=academic",
        *([f"quantization.stem_output_bits={key['stem']}"] if "stem" in key else []),
        *([f"reconstruction.start={key['start']}"] if "start" in key else []),
        f"reconstruction.iterations={key['iterations']}",
        *_CHANGES[key["variant"]],
    ]


def measure(subject: Subject, key: Key) -> dict[str, Any]:
    """Quantize, export, run in ONNX Runtime; the augmenter's distance and the fit on its images as well."""
    with tempfile.TemporaryDirectory() as folder:
        _, synthetic = _MADE.get(key["variant"], ("", 0))
        source = joined(subject, key, Path(folder)) if synthetic else subject
        started = time.monotonic()
        result = quantized(source, settings(key), num=key["num"] + synthetic, seed=key["seed"])
        seconds = time.monotonic() - started
    taught = [h.augmentation for h in result.histories if h.augmentation]
    return {
        **onnx_scores(subject, result),
        "images": len(subject.labels),
        "seconds": round(seconds, 1),
        "meta_seconds": round(sum(a["seconds"] for a in taught), 1),
        "distance": [round(a["distance"], 4) for a in taught],
        "similarity": [round(a["similarity"], 3) for a in taught],
    }


def run(subject: Subject, keys: list[Key]) -> None:
    """Measure every key that is not recorded yet."""
    for key in keys:
        full = {"model": subject.name, **key}
        if is_recorded("metaaug", {**full, "stem": key.get("stem"), "start": key.get("start")}):
            continue
        values = measure(subject, key)
        record("metaaug", full, values)
        print(full, values, flush=True)


def main() -> None:
    """Run the named suites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    parser.add_argument("--part", default="0/1", help="K/N: every Nth key from the Kth, to share a suite")
    parser.add_argument("--only", action="append", metavar="VARIANT", help="leave the other variants out")
    parser.add_argument("--seed", type=int, help="one calibration set only")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    part, parts = map(int, arguments.part.split("/"))
    for name in arguments.suites:
        load, keys = SUITES[name]
        chosen = [key for key in keys() if not arguments.only or key["variant"] in arguments.only]
        chosen = [key for key in chosen if arguments.seed in (None, key["seed"])]
        run(load(), chosen[part::parts])


if __name__ == "__main__":
    main()
