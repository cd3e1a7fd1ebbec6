"""Accuracy tables of docs/benchmarks.md: ``python benchmarks/accuracy.py SUITE [SUITE ...]``.

Suites: resnet20-short (256 images, 300 iterations, 3 seeds), resnet20-long (1 024 images, 2 000
iterations), resnet20-stem (as resnet20-short with the first layer's output at 8 bits), resnet20-default
(so too, learned from second-order rounding: all by default), resnet20-schedules (100 to 1 000
iterations, both rules for the rates), resnet20-w8a8, mobilenet. Every finished run is appended to
benchmarks/results/accuracy.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Subject, bit_settings, is_recorded, measure, mobilenet, record, resnet20


def resnet20_short() -> list[dict[str, Any]]:
    """The setting of the published code's figures in docs/benchmarks.md."""
    return [
        _key(bits, placement, "genie", num=256, iterations=300, seed=seed)
        for seed in range(3)
        for placement in ("academic", "integer")
        for bits in ("w4a4", "w2a4", "w2a2")
    ]


def resnet20_long() -> list[dict[str, Any]]:
    """All images, more steps."""
    return [
        _key(bits, placement, "genie", num=1024, iterations=2000, seed=0)
        for bits in ("w2a2", "w2a4", "w4a4")
        for placement in ("academic", "integer")
    ]


def resnet20_stem() -> list[dict[str, Any]]:
    """The first layer's output at 8 bits, as by default and in the published code."""
    return [
        {**_key(bits, placement, "genie", num=256, iterations=300, seed=seed), "stem": 8}
        for seed in range(3)
        for placement in ("integer", "academic")
        for bits in ("w2a2", "w2a4", "w4a4")
    ]


def resnet20_default() -> list[dict[str, Any]]:
    """So too, and learned from second-order rounding: everything by default."""
    return [{**key, "start": "second-order"} for key in resnet20_stem()]


def resnet20_schedules() -> list[dict[str, Any]]:
    """Iterations under both rules for the learning rates: scaled with the schedule, and as published."""
    return [
        {**_key("w2a2", "academic", "genie", num=256, iterations=steps, seed=seed), "lr_scale": rule}
        for steps in (100, 300, 1000)
        for seed in range(2)
        for rule in ("auto", 1)
    ]


def resnet20_w8a8() -> list[dict[str, Any]]:
    """Searched scales only."""
    return [
        _key("w8a8", placement, "nearest", num=256, iterations=1, seed=seed)
        for placement in ("integer", "academic")
        for seed in range(3)
    ]


def mobilenet_suite() -> list[dict[str, Any]]:
    """W8A8 against ONNX Runtime's own tool, W4A4 with and without learning."""
    keys = [_key("w8a8", "integer", "nearest", num=256, iterations=1, seed=seed) for seed in range(3)]
    keys += [_key("w4a4", "integer", "nearest", num=256, iterations=1, seed=seed) for seed in range(3)]
    keys += [_key("w4a4", "integer", "genie", num=256, iterations=60, seed=0)]
    return keys


SUITES = {
    "resnet20-w8a8": (resnet20, resnet20_w8a8),
    "resnet20-short": (resnet20, resnet20_short),
    "resnet20-long": (resnet20, resnet20_long),
    "resnet20-stem": (resnet20, resnet20_stem),
    "resnet20-default": (resnet20, resnet20_default),
    "resnet20-schedules": (resnet20, resnet20_schedules),
    "mobilenet": (mobilenet, mobilenet_suite),
}


def _key(bits: str, placement: str, method: str, *, num: int, iterations: int, seed: int) -> dict[str, Any]:
    return {
        "bits": bits,
        "placement": placement,
        "method": method,
        "num": num,
        "iterations": iterations,
        "seed": seed,
    }


def _settings(key: dict[str, Any]) -> list[str]:
    return [
        *bit_settings(key["bits"]),
        f"quantization.placement={key['placement']}",
        f"reconstruction.method={key['method']}",
        f"reconstruction.iterations={key['iterations']}",
        *([f"quantization.stem_output_bits={key['stem']}"] if "stem" in key else []),
        *([f"reconstruction.start={key['start']}"] if "start" in key else []),
        f"reconstruction.lr_scale={key.get('lr_scale', 'auto')}",
        "augmentation.kind=none",
    ]


def run(subject: Subject, keys: list[dict[str, Any]]) -> None:
    """Measure every key that is not recorded yet."""
    for key in keys:
        full = {"model": subject.name, **key}
        if is_recorded("accuracy", {**full, "start": key.get("start")}):
            continue
        values = measure(subject, _settings(key), num=key["num"], seed=key["seed"])
        record("accuracy", full, values)
        print(full, {k: v for k, v in values.items() if k != "seconds_per_block"}, flush=True)


def main() -> None:
    """Run the named suites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--reverse", action="store_true", help="last key first, to share a suite")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name in arguments.suites:
        load, keys = SUITES[name]
        run(load(), keys()[::-1] if arguments.reverse else keys())


if __name__ == "__main__":
    main()
