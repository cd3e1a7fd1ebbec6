"""Data-free tables of docs/benchmarks.md: ``python benchmarks/data_free.py SUITE [SUITE ...]``.

Suites: resnet20 (128 images), mobilenet (64 images), mobilenet-128 (the same at 128 px), mobilenet-long (300
iterations, for a GPU), these from the nearest codes; the first three with -default added: by second-order
rounding, without learning and with it; cost (minutes and peak memory of the synthesis alone). Accuracy is
measured with real images, DGH images, DGH without each of its ideas or from another start, and noise, at the
same count of images. The most telling rows come first; every finished run is appended to
benchmarks/results/data_free.jsonl (data_free_cost.jsonl) and not repeated. Sets are kept in
benchmarks/results/sets, which is not part of the repository. One thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    MOBILENET,
    RESNET20,
    RESULTS,
    Subject,
    bit_settings,
    is_recorded,
    measure,
    mobilenet,
    mobilenet_128,
    record,
    resnet20,
)

from metaaug_cli.calibration.data import CalibrationSet, make_calibration_set, save_calibration_set
from metaaug_cli.memory import keep_freed_memory, peak_memory_mib
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.pipeline import pick_device
from metaaug_cli.synthesis.dgh import SynthesisHistory, SynthesisSettings, synthesize_calibration_set

NAME = "data_free"
SETS = RESULTS / "sets"
ABLATIONS: dict[str, dict[str, Any]] = {
    "dgh from plain noise": {"start": "noise"},
    "dgh without whole-set statistics": {"whole_set": False},
    "dgh without preprocessing": {"preprocessing": False},
    "dgh without stretching": {"stretch": "off"},
    "dgh with regularised stretching": {"stretch": "regularised"},
}
MAIN = ("real", "dgh", "noise")
SEEDS = range(3)
COST_STEPS = {("cpu", 32): 4, ("cpu", 224): 1, ("cuda", 32): 3, ("cuda", 224): 3}

Key = dict[str, Any]
# The simulation of many images takes longer than a short run.
_UNSIMULATED = {"mobilenet-long", "resnet20-default", "mobilenet-default", "mobilenet-128-default"}
_GRID = tuple(product(("w4a4", "w8a8", "w2a4"), ("integer", "full")))


def resnet20_keys() -> Iterator[Key]:
    """Main comparison first, then the ablations."""
    near, learned, short = ("nearest", 1), ("genie", 300), ("genie", 100)
    groups = [
        (["w4a4", "w8a8"], ["integer"], [near], MAIN),
        (["w4a4"], ["integer"], [learned], MAIN),
        (["w4a4"], ["full"], [near, short], MAIN),
        (["w4a4"], ["integer"], [short], MAIN),
        (["w2a4"], ["integer", "full"], [short], MAIN),
        (["w8a8"], ["full"], [near], MAIN),
        (["w8a8"], ["integer", "full"], [short], MAIN),
        (["w2a4"], ["integer", "full"], [near], MAIN),
        (["w4a4"], ["integer", "full"], [near, short], tuple(ABLATIONS)),
        (["w2a4"], ["integer", "full"], [short], tuple(ABLATIONS)),
        (["w8a8"], ["integer", "full"], [near], tuple(ABLATIONS)),
    ]
    for bits, placements, methods, images in groups:
        yield from _keys(bits, placements, methods, images, num=128)


def mobilenet_keys() -> Iterator[Key]:
    """Searched scales at 8 bits (at 4 they end at chance), learning below; seed by seed."""
    near, learned = ("nearest", 1), ("genie", 60)
    cells = [("w8a8", "integer", near), ("w4a4", "integer", learned), ("w8a8", "full", near)]
    cells += [("w4a4", "full", learned), ("w2a4", "integer", learned)]
    keys = [k for b, placement, method in cells for k in _keys([b], [placement], [method], MAIN, num=64)]
    yield from sorted(keys, key=lambda key: key["seed"])


def mobilenet_128_keys() -> Iterator[Key]:
    """Where images start from, at 4 bits with learning; other cells; each idea removed; seed by seed."""
    near, learned = ("nearest", 1), ("genie", 60)
    cells = [
        ("w4a4", "integer", learned, ("real", "dgh", "dgh from plain noise")),
        ("w8a8", "integer", near, MAIN),
        ("w8a8", "full", near, MAIN),
        ("w4a4", "integer", learned, ("noise",)),
        ("w4a4", "full", learned, MAIN),
        ("w4a4", "integer", learned, tuple(ABLATIONS)),
    ]
    for bits, placement, method, kinds in cells:
        keys = _keys([bits], [placement], [method], kinds, num=64)
        yield from sorted(keys, key=lambda key: key["seed"])


def resnet20_default_keys() -> Iterator[Key]:
    """Without learning."""
    groups = [(b, p, [("gptq", 1)], MAIN) for b, p in _GRID]
    yield from _default_keys(groups, num=128)


def mobilenet_default_keys() -> Iterator[Key]:
    """224 px, without learning."""
    groups = [(b, p, [("gptq", 1)], MAIN) for b, p in _GRID]
    yield from _default_keys(groups, num=64)


def mobilenet_128_default_keys() -> Iterator[Key]:
    """128 px: each idea removed as well, and learned where that helps."""
    everything = (*MAIN, *ABLATIONS)
    groups = [(b, p, [("gptq", 1)], everything) for b, p in _GRID]
    groups += [("w4a4", "integer", [("genie", 60)], everything), ("w4a4", "full", [("genie", 60)], MAIN)]
    groups += [("w2a4", "integer", [("genie", 60)], MAIN)]
    yield from _default_keys(groups, num=64)


def _default_keys(
    groups: Iterable[tuple[str, str, list[tuple[str, int]], tuple[str, ...]]], *, num: int
) -> Iterator[Key]:
    for bits, placement, methods, kinds in groups:
        for key in _keys([bits], [placement], methods, kinds, num=num):
            yield {**key, "start": "second-order", "stem": 8}


def mobilenet_long_keys() -> Iterator[Key]:
    """224 px with a schedule that learns something at 2 bits too: minutes on a GPU, hours on a CPU."""
    kinds, learned = ("real", "dgh", "dgh from plain noise", "noise"), [("genie", 300)]
    for bits, placement in (("w4a4", "integer"), ("w2a4", "integer"), ("w4a4", "full"), ("w2a4", "full")):
        yield from _keys([bits], [placement], learned, kinds, num=64)


def _keys(
    bits: list[str],
    placements: list[str],
    methods: list[tuple[str, int]],
    images: tuple[str, ...],
    *,
    num: int,
) -> Iterator[Key]:
    for b, placement, (method, iterations), seed, kind in product(bits, placements, methods, SEEDS, images):
        yield {
            "bits": b,
            "placement": placement,
            "method": method,
            "iterations": iterations,
            "images_from": kind,
            "num": num,
            "seed": seed,
        }


def run(subject: Subject, keys: Iterable[Key], *, simulate: bool = True) -> None:
    """Measure every key that is not recorded yet; see ``common.measure`` for ``simulate``."""
    for key in keys:
        full = {"model": subject.name, **key}
        if is_recorded(NAME, {**full, "start": key.get("start")}):
            continue
        kind, num, seed = key["images_from"], key["num"], key["seed"]
        source = subject if kind == "real" else replace(subject, calib=stored_set(subject, kind, num, seed))
        values = measure(source, _settings(key), num=num, seed=seed, simulate=simulate)
        values.pop("seconds_per_block")
        record(NAME, full, values)
        print(full, values, flush=True)


def _settings(key: Key) -> list[str]:
    by_default = ["reconstruction.start=second-order", f"quantization.stem_output_bits={key.get('stem')}"]
    return [
        *(by_default if "start" in key else []),
        *bit_settings(key["bits"]),
        f"quantization.placement={key['placement']}",
        f"reconstruction.method={key['method']}",
        f"reconstruction.iterations={key['iterations']}",
        "augmentation.kind=none",
    ]


def stored_set(subject: Subject, kind: str, num: int, seed: int) -> Path:
    """A synthetic set, made once for all the runs that use it; an interrupted one goes on."""
    path = SETS / f"{subject.name}-{kind}-{num}-{seed}.safetensors".replace(" ", "-")
    if path.exists():
        return path
    SETS.mkdir(exist_ok=True)
    if kind == "noise":
        save_calibration_set(noise(subject.model.preprocessing, num, seed), path)
        return path
    settings = SynthesisSettings(num=num, seed=seed, **ABLATIONS.get(kind, {}))
    state = path.with_suffix(".partial")
    history, started = SynthesisHistory(), time.monotonic()
    made = synthesize_calibration_set(
        subject.model,
        settings,
        device=pick_device("auto"),
        state_path=state,
        resume=state.exists(),
        history=history,
    )
    save_calibration_set(made, path)
    state.unlink(missing_ok=True)
    print(f"{path.name}: BN loss {history.losses[-1]:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return path


def noise(preprocessing: Preprocessing, num: int, seed: int) -> CalibrationSet:
    """Gaussian noise with the mean and deviation of the training images, clipped to valid pixels."""
    shape = (num, preprocessing.channels, *preprocessing.size)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pixels = preprocessing.denormalise(drawn).mul(255).round().clamp(0, 255).to(torch.uint8)
    names = [f"noise-{i:05d}" for i in range(num)]
    return make_calibration_set(preprocessing.normalise(pixels), preprocessing, names, origin="noise")


def cost() -> None:
    """Each size in a process of its own, whose peak memory is then its own; a GPU forgets it on request."""
    device = pick_device("auto").type
    for side, num in ((32, 64), (32, 256), (32, 1024), (224, 64), (224, 256), (224, 1024)):
        key: Key = {"side": side, "num": num, "batch": 32, "steps_timed": COST_STEPS[device, side]}
        key |= {"device": device} if device == "cuda" else {}
        if is_recorded(f"{NAME}_cost", key):
            continue
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            values = cost_of(side, num)
        else:
            command = [sys.executable, __file__, "cost", "--worker", str(side), str(num)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values = json.loads(done.stdout.splitlines()[-1])
        record(f"{NAME}_cost", key, values)
        print(key, values, flush=True)


def cost_of(side: int, num: int) -> dict[str, Any]:
    """What a few steps of every image take."""
    model = (RESNET20 if side == 32 else MOBILENET).load()
    keep_freed_memory()
    before = peak_memory_mib()
    ticks: list[float] = []
    device = pick_device("auto")
    settings = SynthesisSettings(num=num, iterations=COST_STEPS[device.type, side])

    def tick(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ticks.append(time.monotonic())

    started = time.monotonic()
    synthesize_calibration_set(model, settings, device=device, tick=tick)
    # The steps alone, without tracing the network and without the first look at every batch.
    per_step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    default = SynthesisSettings(num=num)
    return {
        "model": model.name,
        "seconds_in_all": round(time.monotonic() - started, 1),
        "seconds_per_step": round(per_step, 3),
        "default_iterations": default.iterations,
        "minutes_at_default": round(per_step * default.steps / 60, 1),
        "peak_memory_mib_before": before,
        "peak_memory_mib": peak_memory_mib(),
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 1),
    }


SUITES: dict[str, tuple[Callable[[], Subject], Callable[[], Iterator[Key]]]] = {
    "resnet20": (resnet20, resnet20_keys),
    "mobilenet": (mobilenet, mobilenet_keys),
    "mobilenet-128": (mobilenet_128, mobilenet_128_keys),
    "resnet20-default": (resnet20, resnet20_default_keys),
    "mobilenet-default": (mobilenet, mobilenet_default_keys),
    "mobilenet-128-default": (mobilenet_128, mobilenet_128_default_keys),
    "mobilenet-long": (mobilenet, mobilenet_long_keys),
}


def main() -> None:
    """Run the named suites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=(*SUITES, "cost"))
    parser.add_argument("--only", action="append", metavar="IMAGES", help="leave other kinds of images out")
    parser.add_argument("--seed", type=int, help="one seed only, to share a suite")
    parser.add_argument("--method", help="leave other methods out")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        print(json.dumps(cost_of(*arguments.worker)))
        return
    for suite in arguments.suites:
        if suite == "cost":
            cost()
            continue
        load, keys = SUITES[suite]
        chosen = [k for k in keys() if not arguments.only or k["images_from"] in arguments.only]
        chosen = [k for k in chosen if arguments.seed in (None, k["seed"])]
        chosen = [k for k in chosen if arguments.method in (None, k["method"])]
        run(load(), chosen, simulate=suite not in _UNSIMULATED)


if __name__ == "__main__":
    main()
