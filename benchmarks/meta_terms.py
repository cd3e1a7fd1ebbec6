"""What each term of the outer loss sends to T, by kind of inner step: ``python benchmarks/meta_terms.py``.

ResNet-20, W2A2, 32 images, seed 0, 200 iterations. For every variant: means and medians over blocks and
recorded outer steps of the gradient norms at T's parameters, means of L_val before and after the inner step;
T's distance from the images after each block; top-1 in ONNX Runtime of the result. Finished variants are
kept in benchmarks/results/meta_terms.jsonl and not repeated.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import Subject, is_recorded, onnx_scores, quantized, record, resnet20

_COMMON = [
    "quantization.weight_bits=2",
    "quantization.act_bits=2",
    "quantization.placement=academic",
    "reconstruction.iterations=200",
    "augmentation.kind=metaaug",
    "metaaug.batch_size=16",
    "metaaug.val_batch_size=32",
    "metaaug.base_width=16",
    "metaaug.steps=50",
]
_RAW = ["metaaug.balance=false"]
_UNET = ["metaaug.form=unet", "metaaug.distance=published"]
VARIANTS: dict[str, list[str]] = {
    "policy, fresh Adam step, published weights": ["metaaug.inner=adam-fresh", *_RAW],
    "policy, preconditioned step, published weights": ["metaaug.inner=preconditioned", *_RAW],
    "policy, sgd step, published weights": ["metaaug.inner=sgd", *_RAW],
    "policy, preconditioned step, balanced": ["metaaug.inner=preconditioned"],
    "policy, balanced, validation off": ["metaaug.inner=preconditioned", "metaaug.val_weight=0"],
    "unet, fresh Adam step, published weights and distance": [*_UNET, "metaaug.inner=adam-fresh", *_RAW],
    "unet, preconditioned step, balanced": ["metaaug.form=unet", "metaaug.inner=preconditioned"],
    "residual, preconditioned step, balanced": ["metaaug.form=residual", "metaaug.inner=preconditioned"],
    "residual, balanced, validation off": [
        "metaaug.form=residual",
        "metaaug.inner=preconditioned",
        "metaaug.val_weight=0",
    ],
}


def measure(subject: Subject, settings: list[str]) -> dict[str, Any]:
    """One run with its run directory, where the outer steps are."""
    with tempfile.TemporaryDirectory() as folder:
        result = quantized(subject, [*_COMMON, *settings], num=32, seed=0, run_dir=Path(folder) / "run")
        files = sorted((Path(folder) / "run" / "augmentation").glob("*.json"))
        taught = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    steps = [step for block in taught for step in block["records"]]
    norms = list(zip(*(step["gradients"] for step in steps), strict=True))
    return {
        **dict(zip(("validation", "margin", "preservation"), map(mean, norms), strict=True)),
        "medians": [median(values) for values in norms],
        "l_val_before": mean(step["validation_before"] for step in steps),
        "l_val_after": mean(step["validation"] for step in steps),
        "lower": mean(step["validation"] < step["validation_before"] for step in steps),
        "distance": [round(block["distance"], 4) for block in taught],
        "similarity": [round(block["similarity"], 3) for block in taught],
        **onnx_scores(subject, result),
    }


def main() -> None:
    """Measure every variant that is not recorded yet."""
    torch.set_num_threads(1)
    subject = resnet20()
    for variant, settings in VARIANTS.items():
        key = {"model": subject.name, "variant": variant}
        if not is_recorded("meta_terms", key):
            values = measure(subject, settings)
            record("meta_terms", key, values)
            print(key, values, flush=True)


if __name__ == "__main__":
    main()
