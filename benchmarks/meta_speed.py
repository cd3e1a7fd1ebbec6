"""Seconds of one outer step against the same step done the obvious way: ``python benchmarks/meta_speed.py``.

The obvious way computes what the method says, each time anew and operator by operator: the whole quantized
network's state is copied for the inner step, both networks run from the image to the logits, the float
network's views of the original images and the validation images' way to the block are computed in every
step, every quantizer is its formula in PyTorch operators, and activations lie in PyTorch's usual order.
Both ways run in one process in turn, on the GPU where there is one, and must give the same outer gradients.
Rewrites benchmarks/results/meta_speed.jsonl (on a GPU meta_speed_gpu.jsonl); wants an idle machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch
from common import RESULTS, Subject, machine, mobilenet, plain_operators, resnet20
from torch import Tensor

from metaaug_cli.augmentation import passes as passes_module
from metaaug_cli.augmentation.bilevel import BiLevel, MetaSchedule, Outer, inner_mode
from metaaug_cli.augmentation.passes import Passes
from metaaug_cli.calibration.data import load_calibration_set
from metaaug_cli.layout import fast_layout
from metaaug_cli.memory import keep_freed_memory, peak_gpu_memory_mib, peak_memory_mib
from metaaug_cli.pipeline import pick_device
from metaaug_cli.prepare import prepare_chain, schedule_of
from metaaug_cli.quantization.blocks import Block, search_activation_scales
from metaaug_cli.quantization.graphed import GraphedStep, recorded_steps
from metaaug_cli.quantization.reconstruct import Schedule
from metaaug_cli.recipe.config import Recipe

_ROUNDS = 5
_WARM_UP = 3  # calls of a recorded step before it is replayed
_SCHEDULE = MetaSchedule(inner="preconditioned")
_SUBJECTS: list[tuple[Callable[[], Subject], int, int, tuple[int, ...]]] = [
    (resnet20, 32, 64, (1, 4, 9)),
    (mobilenet, 8, 16, (2, 8)),
]
_RADIUS = 0.3


@dataclass
class Step:
    """One outer step's inputs: originals, T(x) and validation images."""

    block: Block
    passes: Passes
    inner: Schedule
    x: Tensor
    made: Tensor
    validation: Tensor

    def __post_init__(self) -> None:
        self.drops = torch.Generator(device=self.x.device).manual_seed(0)

    def ours(self) -> Callable[[], Outer]:
        """The step as the tool does it: views and the validation images' prefix come from a cache."""
        with torch.no_grad():
            _, h_val = self.passes.prefixes(self.validation, self.block.index)
            views, val_views = self.passes.rest((self.x,), 0), self.passes.rest((self.validation,), 0)

        def step() -> Outer:
            return self._outer(self.passes, self.block, views, h_val, val_views)

        return step

    @contextmanager
    def replayed(self) -> Iterator[Callable[[], Tensor]]:
        """The gradients (3, N, C, H, W) of ``ours``, on a GPU recorded and replayed as the tool does it."""
        ours = self.ours()
        if self.x.device.type != "cuda":
            yield lambda: torch.stack(ours().gradients)
            return
        with recorded_steps(lambda _: torch.stack(ours().gradients), generators=[self.drops]) as (step,):
            for _ in range(_WARM_UP + 1):
                step([])
            yield lambda: step([])

    def obvious(self, layout: Callable[[Tensor], Tensor] = lambda x: x) -> Outer:
        """The same step with nothing cached, after a copy of the whole quantized network's state."""
        with plain_operators(self.passes.blocks), patch.object(passes_module, "fast_layout", layout):
            return self._obvious()

    def _obvious(self) -> Outer:
        passes, block, blocks = self.passes, self.block, self.passes.blocks
        copied = [t.detach().clone() for b in blocks for t in b.quantized_block.state_dict().values()]
        assert copied
        views, val_views = passes.rest((self.x,), 0), passes.rest((self.validation,), 0)
        passes.prefixes(self.made.clone().requires_grad_(), len(blocks))  # hooks see the block on the way
        _, h_val = passes.prefixes(self.validation, block.index)
        return self._outer(passes, block, views, h_val, val_views)

    def _outer(self, passes: Passes, block: Block, views: object, h_val: object, val_views: object) -> Outer:
        with inner_mode(block, self.inner.quant_prob, self.drops):
            level = BiLevel(block, passes, self.inner, _SCHEDULE, _RADIUS, self.drops)
            return level.outer(self.x, self.made.clone(), views, h_val, val_views)  # type: ignore[arg-type]


def steps_of(
    subject: Subject, batch: int, validation: int, chosen: tuple[int, ...], device: torch.device
) -> list[Step]:
    """The chosen blocks of one network at W2A2, academic placement, earlier blocks frozen."""
    recipe = Recipe().override(
        ["quantization.weight_bits=2", "quantization.act_bits=2", "quantization.placement=academic"]
    )
    images = load_calibration_set(
        subject.calib, preprocessing=subject.model.preprocessing, num=batch + validation, seed=0
    ).images
    size = images.shape[1:]
    chain = prepare_chain(subject.model.module, tuple(size), recipe).to(device)
    images = images.to(device)
    passes, values = Passes(chain.blocks), (images[:batch],)
    with torch.no_grad():
        for block in chain.blocks:
            search_activation_scales(block, values)
            values = block.quantized_block(*values)
    x = images[:batch]
    made = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    return [
        Step(chain.blocks[index], passes, schedule_of(recipe), x, made, images[batch:]) for index in chosen
    ]


def measure(step: Step) -> dict[str, object]:
    """Median seconds of both ways, in turn, and how far their gradients are apart."""
    for block in step.passes.blocks:
        learns = block.index >= step.block.index
        block.quantized_block.requires_grad_(learns)
    # In another layout sums round otherwise, and values at the border of two codes fall on the other side.
    gradients = {"obvious": torch.stack(step.obvious(fast_layout).gradients)}
    seconds: dict[str, list[float]] = {"ours": [], "obvious": []}
    if step.x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with step.replayed() as ours:
        step.drops.manual_seed(0)
        gradients["ours"] = ours().clone()
        ways: dict[str, Callable[[], object]] = {"ours": ours, "obvious": step.obvious}
        for _ in range(_ROUNDS):
            for name, way in ways.items():
                started = _now(step.x.device)
                way()
                seconds[name].append(_now(step.x.device) - started)
    found = {name: median(values) for name, values in seconds.items()}
    difference = max(
        float((a - b).norm() / b.norm().clamp(min=1e-20))
        for a, b in zip(gradients["ours"], gradients["obvious"], strict=True)
    )
    return {
        "block": step.block.name,
        "batch": len(step.x),
        "validation": len(step.validation),
        "seconds": round(found["ours"], 4),
        "seconds_obvious": round(found["obvious"], 4),
        "ratio": round(found["obvious"] / found["ours"], 2),
        "gradient_difference": difference,
        "peak_memory_mib": peak_memory_mib(),
        "peak_gpu_memory_mib": peak_gpu_memory_mib(),
        "replayed": step.x.device.type == "cuda" and GraphedStep.possible,
        "machine": machine(),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure every chosen block."""
    keep_freed_memory()
    device, lines = pick_device("auto"), []
    for load, batch, validation, chosen in _SUBJECTS:
        subject = load()
        for step in steps_of(subject, batch, validation, chosen, device):
            line = {"model": subject.name, **measure(step)}
            lines.append(line)
            print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    name = "meta_speed_gpu.jsonl" if device.type == "cuda" else "meta_speed.jsonl"
    (RESULTS / name).write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
