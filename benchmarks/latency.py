"""Latency and size of a ResNet-18-shaped network at 224 pixels: float against every form, W8A8 and W4A4.

``python benchmarks/latency.py`` on an otherwise idle machine rewrites benchmarks/results/latency.jsonl. The
weights are random (time does not depend on them); one thread, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse

import torch
from common import RESULTS, record
from torch import nn

from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.deployment.latency import FLOAT, ROUNDS, Latency, measure_forms
from metaaug_cli.networks.models import load_model
from metaaug_cli.pipeline import quantize
from metaaug_cli.recipe.config import Recipe

BITS = ((8, 8), (4, 4))
IMAGES = 8


def quantized_forms(name: str, weight_bits: int, act_bits: int, rounds: int) -> dict[str, Latency]:
    """Quantize a random network without learning and time its forms."""
    torch.manual_seed(0)
    model = load_model(name, weights="random")
    assert isinstance(model.module, nn.Module)
    images = torch.randn(IMAGES, 3, *model.preprocessing.size)
    sources = ("random",) * IMAGES
    calibration = CalibrationSet(images, model.preprocessing, sources, (), "0" * 64, "random pixels")
    settings = [f"quantization.weight_bits={weight_bits}", f"quantization.act_bits={act_bits}"]
    recipe = Recipe().override([*settings, "reconstruction.method=nearest"])
    result = quantize(model, calibration, recipe=recipe, device="cpu")
    return measure_forms(result.float_module, result.deployed, result.input_size, rounds=rounds)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    (RESULTS / "latency.jsonl").unlink(missing_ok=True)
    for weight_bits, act_bits in BITS:
        found = quantized_forms(arguments.model, weight_bits, act_bits, arguments.rounds)
        base = found[FLOAT]
        for form, latency in found.items():
            key = {"model": arguments.model, "bits": f"w{weight_bits}a{act_bits}", "form": form}
            values = {
                "bytes": latency.size_bytes,
                "milliseconds": {str(b): round(ms, 2) for b, ms in latency.milliseconds.items()},
                "of_float": {
                    str(b): round(ms / base.milliseconds[b], 3) for b, ms in latency.milliseconds.items()
                },
                "rounds": arguments.rounds,
            }
            record("latency", key, values)
            print(key, values, flush=True)


if __name__ == "__main__":
    main()
