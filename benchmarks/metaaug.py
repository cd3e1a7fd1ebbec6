"""What the learned augmenter is worth: ``python benchmarks/metaaug.py SUITE [SUITE ...]``.

All variants of a suite see the same calibration sets (seed = set) and are evaluated in ONNX Runtime on the
same test images, so that differences are paired. Suites: main (32 images, every variant), images (64 to
512), w2a4, ablation (weights, preservation, inner steps, epsilon, fixed kinds). Finished runs are kept in
benchmarks/results/metaaug.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Subject, is_recorded, quantized, record, resnet20

from metaaug_cli.evaluation import onnx_predictor, predict, score
from metaaug_cli.export import export_onnx
from metaaug_cli.manifest import Manifest
from metaaug_cli.ort import open_session

Key = dict[str, Any]
_SETS = range(5)
_ITERATIONS = 500
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
    "policy+flip+crop": [f"{_LEARNED}+flip+crop", *_POLICY],
    "residual": [_LEARNED, *_RESIDUAL],
    "residual, validation off": [_LEARNED, *_RESIDUAL, _VALIDATION_OFF],
    "genie, twice the iterations": ["augmentation.kind=none"],
    "residual+pool": [f"{_LEARNED}+{_POOL}", *_RESIDUAL],
}


def _key(variant: str, *, bits: str = "w2a2", num: int = 32, seed: int, iterations: int = _ITERATIONS) -> Key:
    if variant.endswith("twice the iterations"):
        iterations *= 2
    return {"variant": variant, "bits": bits, "num": num, "seed": seed, "iterations": iterations}


def main_table() -> list[Key]:
    """W2A2, 32 images: every claim that needs five paired calibration sets, the most telling first."""
    return [_key(variant, seed=seed) for variant in VARIANTS for seed in _SETS]


def images() -> list[Key]:
    """More images: the shape of the paper's Table A.8."""
    order = ("genie", "pool", "policy")
    return [
        _key(variant, num=num, seed=seed)
        for num in (512, 128, 64, 256)
        for seed in _SETS
        for variant in order
    ]


def four_bit_activations() -> list[Key]:
    """W2A4 with 32 images."""
    return [
        _key(variant, bits="w2a4", seed=seed) for seed in _SETS for variant in ("genie", "pool", "policy")
    ]


def ablation() -> list[Key]:
    """One change at a time, two calibration sets: weights, preservation, epsilon, inner steps."""
    return [_key(variant, seed=seed) for variant in ABLATION for seed in range(2)]


ABLATION = {
    "policy, lambda 1 = 1": [_LEARNED, *_POLICY, "metaaug.val_weight=1"],
    "policy, lambda 1 = 25": [_LEARNED, *_POLICY, "metaaug.val_weight=25"],
    "policy, preserve kl": [_LEARNED, *_POLICY, "metaaug.preservation=kl"],
    "policy, preserve mse": [_LEARNED, *_POLICY, "metaaug.preservation=mse"],
    "policy, preserve off": [_LEARNED, *_POLICY, "metaaug.preserve_weight=0"],
    "policy, inner sgd": [_LEARNED, *_POLICY, "metaaug.inner=sgd"],
    "policy, inner adam-fresh": [_LEARNED, *_POLICY, "metaaug.inner=adam-fresh"],
    "policy, walk of 20 inner steps": [_LEARNED, *_POLICY, "metaaug.restart_every=20"],
    "residual, epsilon 0.1": [_LEARNED, *_RESIDUAL, "metaaug.epsilon=0.1"],
    "residual, epsilon 0.03": [_LEARNED, *_RESIDUAL, "metaaug.epsilon=0.03"],
    "trivial-geometric": ["augmentation.kind=trivial-geometric"],
    "geometric": ["augmentation.kind=geometric"],
    "mixup": ["augmentation.kind=mixup"],
    "cutmix": ["augmentation.kind=cutmix"],
    "photometric": ["augmentation.kind=photometric"],
    "rand-geometric": ["augmentation.kind=rand-geometric"],
}
_CHANGES = VARIANTS | ABLATION

SUITES: dict[str, tuple[Callable[[], Subject], Callable[[], list[Key]]]] = {
    "main": (resnet20, main_table),
    "images": (resnet20, images),
    "w2a4": (resnet20, four_bit_activations),
    "ablation": (resnet20, ablation),
}


def settings(key: Key) -> list[str]:
    """Recipe settings of one run."""
    return [
        f"quantization.weight_bits={key['bits'][1]}",
        f"quantization.act_bits={key['bits'][3]}",
        "quantization.placement=academic",
        f"reconstruction.iterations={key['iterations']}",
        *_CHANGES[key["variant"]],
    ]


def measure(subject: Subject, key: Key) -> dict[str, Any]:
    """Quantize, export, run in ONNX Runtime; the augmenter's distance and the fit on its images as well."""
    started = time.monotonic()
    result = quantized(subject, settings(key), num=key["num"], seed=key["seed"])
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        manifest = Manifest(model=subject.name, placement="academic", method="benchmark")
        export_onnx(result.deployed, input_size=result.input_size, path=path, manifest=manifest)
        batches = zip(subject.images.split(50), subject.labels.split(50), strict=True)
        scores = score(predict({"onnxruntime": onnx_predictor(open_session(path))}, batches)).scores
    taught = [h.augmentation for h in result.histories if h.augmentation]
    return {
        "onnxruntime": round(100 * scores["onnxruntime"].top1, 2),
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
        if is_recorded("metaaug", full):
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
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    part, parts = map(int, arguments.part.split("/"))
    for name in arguments.suites:
        load, keys = SUITES[name]
        run(load(), keys()[part::parts])


if __name__ == "__main__":
    main()
