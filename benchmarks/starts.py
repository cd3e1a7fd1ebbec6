"""What blocks start from: ``python benchmarks/starts.py SUITE [SUITE ...]``.

For each calibration set: nearest rounding and ``gptq`` without learning, and ``genie`` learned from either.
Suites: resnet20 (256 images, 200 iterations), resnet20-few (32 images, W2A2), mobilenet-128 (64 images of
128 px, 100 iterations), mobilenet (64 images of 224 px, 60 iterations). ``integer`` placement. Finished runs
are kept in benchmarks/results/starts.jsonl and not repeated. One thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

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

Key = dict[str, Any]
VARIANTS = {
    "nearest": ["reconstruction.method=nearest"],
    "gptq": ["reconstruction.method=gptq"],
    "genie from nearest": ["reconstruction.method=genie", "reconstruction.start=nearest"],
    "genie from gptq": ["reconstruction.method=genie", "reconstruction.start=second-order"],
}
_BY_DEFAULT = ["quantization.stem_output_bits=8", "augmentation.kind=none"]

# Network, bits in the order they are measured, images, iterations.
SUITES: dict[str, tuple[Callable[[], Subject], tuple[str, ...], int, int]] = {
    "resnet20": (resnet20, ("w2a2", "w4a4", "w2a4"), 256, 200),
    "resnet20-few": (resnet20, ("w2a2",), 32, 200),
    "mobilenet-128": (mobilenet_128, ("w4a4", "w2a4"), 64, 100),
    "mobilenet": (mobilenet, ("w4a4", "w2a4"), 64, 60),
}


def run(subject: Subject, keys: list[Key]) -> None:
    """Measure every key that is not recorded yet."""
    for key in keys:
        full = {"model": subject.name, **key}
        if is_recorded("starts", full):
            continue
        settings = [
            *bit_settings(key["bits"]),
            f"reconstruction.iterations={key['iterations']}",
            *_BY_DEFAULT,
            *VARIANTS[key["variant"]],
        ]
        started = time.monotonic()
        result = quantized(subject, settings, num=key["num"], seed=key["seed"])
        seconds = round(time.monotonic() - started, 1)
        values = {**onnx_scores(subject, result), "images": len(subject.labels), "seconds": seconds}
        record("starts", full, values)
        print(full, values, flush=True)


def main() -> None:
    """Run the named suites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="leave the other variants out")
    arguments = parser.parse_args()
    for suite in arguments.suites:
        load, widths, num, iterations = SUITES[suite]
        keys = [
            {"variant": variant, "bits": bits, "num": num, "iterations": iterations, "seed": seed}
            for bits in widths
            for seed in range(arguments.seeds)
            for variant in arguments.only or VARIANTS
        ]
        run(load(), keys)


if __name__ == "__main__":
    main()
