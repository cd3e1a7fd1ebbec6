"""MetaAug's steps, and the same done the obvious way: ``python benchmarks/meta_speed.py``.

Every block that teaches T, and every learned block: seconds of an outer step (T, the bi-level step, T's
update) and of a learning step, as the tool does them and in two ways of ``obvious.py`` ("obvious" walks whole
networks, "stopping" stops at the block), in one process in turn. All draw the same and must send T the same
gradients and find the same reconstruction loss. Their sums over the blocks at the published outer steps and
the default iterations are what a run takes; the memory of each way, beside the networks and the kept
activations, is that of a process of its own, or of its tensors on a GPU.
On a CPU ResNet-20 and MobileNet-V1, on a GPU ResNet-20 and a network of ResNet-18's shape with random weights
and images, which change no time but leave no gradient worth comparing. Rewrites
benchmarks/results/meta_speed.jsonl (on a GPU meta_speed_gpu.jsonl); wants an idle machine. ``--way`` with
``--case`` runs one way alone for its memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import MOBILENET_128, RESNET20, RESULTS, SHARED, Network, bit_settings, machine
from obvious import ObviousData, ObviousLearner, ObviousPasses, obvious_way
from torch import Tensor

from metaaug_cli.augmentation.bilevel import BiLevel, MetaSchedule, Outer
from metaaug_cli.augmentation.learned import LearnedAugmentation
from metaaug_cli.augmentation.meta import MetaLearner
from metaaug_cli.calibration.data import load_calibration_set
from metaaug_cli.layout import fast_layout
from metaaug_cli.memory import keep_freed_memory
from metaaug_cli.networks.models import LoadedModel, load_model
from metaaug_cli.pipeline import pick_device
from metaaug_cli.prepare import augmenter_of, meta_schedule_of, prepare_chain, schedule_of
from metaaug_cli.quantization.blocks import Block, search_activation_scales
from metaaug_cli.quantization.cache import BlockData, Stream, Values
from metaaug_cli.quantization.graphed import GraphedStep
from metaaug_cli.quantization.reconstruct import BlockLearner, Schedule, Tick, training
from metaaug_cli.recipe.config import Recipe

_OURS = "ours"
_STOPS = {"obvious": False, "stopping": True}
_WAYS = (_OURS, *_STOPS)
_LARGEST_DIFFERENCE = 1e-2
_ROUNDS = 3
# Of these the first are not timed: they warm up, and a GPU records the third of ours.
_STEPS = {"cpu": (3, 1), "cuda": (4, 1)}
_STEPS_OF_OURS = {"cpu": (3, 1), "cuda": (10, 5)}
_PUBLISHED_OUTER_STEPS = 500


@dataclass(frozen=True)
class Case:
    """A network, and how many images T changes and a block is validated on in one step.

    Args:
        network: Trained, with images; None for ResNet-18's shape at 224 px.
    """

    name: str
    network: Network | None
    batch: int
    validation: int

    def load(self) -> tuple[LoadedModel, Tensor]:
        """The network and (batch + validation, C, H, W) images."""
        count = self.batch + self.validation
        if self.network is None:
            model, generator = load_model("resnet18", weights="random"), torch.Generator().manual_seed(0)
            return model, torch.randn(count, 3, *model.preprocessing.size, generator=generator)
        model, folder = self.network.load(), SHARED / "data" / self.network.data / "calib"
        found = load_calibration_set(folder, preprocessing=model.preprocessing, num=count, seed=0)
        return model, found.images


_RESNET20 = Case("resnet20", RESNET20, 32, 64)
_CASES = {
    "cpu": [_RESNET20, Case(MOBILENET_128.name, MOBILENET_128, 16, 32)],
    "cuda": [_RESNET20, Case("resnet18 shape, 224 px", None, 32, 64)],
}


@dataclass
class Both:
    """One network at W2A2, its blocks' scales searched one after the other, and a learner for each way."""

    case: Case
    device: torch.device
    blocks: list[Block] = field(init=False)
    images: Tensor = field(init=False)
    passes: dict[str, ObviousPasses] = field(init=False)
    fresh: dict[str, Callable[[], MetaLearner]] = field(init=False)
    learners: dict[str, MetaLearner] = field(init=False)
    schedule: Schedule = field(init=False)
    outer: MetaSchedule = field(init=False)

    def __post_init__(self) -> None:
        model, self.images = self.case.load()
        settings = (*bit_settings("w2a2"), "quantization.placement=academic", "augmentation.kind=metaaug")
        sizes = (f"metaaug.batch_size={self.case.batch}", f"metaaug.val_batch_size={self.case.validation}")
        recipe = Recipe().override([*settings, *sizes])
        size = (model.preprocessing.channels, *model.preprocessing.size)
        self.blocks = prepare_chain(model.module, size, recipe).to(self.device).blocks
        self.schedule = schedule_of(recipe)
        self.outer = meta_schedule_of(recipe)

        def ours() -> MetaLearner:
            return LearnedAugmentation(
                augmenter_of(recipe), self.outer, self.blocks, self.images, model.preprocessing,
                operations="none", copies=1, seed=0, device=self.device,
            ).learner  # fmt: skip

        def obvious(way: str) -> MetaLearner:
            made = ours()
            return ObviousLearner(made.augmenter, self.passes[way], self.images, made.views, self.outer)

        self.passes = {way: ObviousPasses(self.blocks, stops=stops) for way, stops in _STOPS.items()}
        self.fresh = {_OURS: ours} | {way: partial(obvious, way) for way in _STOPS}
        self.learners = {way: make() for way, make in self.fresh.items()}

    def walk(self) -> Iterator[tuple[Block, BlockData]]:
        """Every block with its inputs, which the blocks before it have their codes for."""
        values: Values = (fast_layout(self.images.to(self.device)),)
        wanted = values
        for block in self.blocks:
            with torch.no_grad():
                search_activation_scales(block, values)
                targets = block.float_block(*wanted)
            there, here = (Stream(v, self.device) for v in (wanted, values))
            yield block, BlockData(there, here, block.float_block, targets, block.computed)
            block.quantized_block.requires_grad_(requires_grad=False)
            with torch.no_grad():
                values, wanted = block.quantized_block(*values), targets

    def outer_seconds(self, way: str, block: Block, data: BlockData) -> list[float]:
        """Seconds of some outer steps."""
        generator = torch.Generator().manual_seed(0)
        self.learners[way].schedule = replace(self.outer, steps=self._steps(way)[0])
        learn = partial(self.learners[way].learn, block, self._read(way, block, data), self.schedule)
        return self._timed(way, lambda tick: learn(generator=generator, tick=tick, measured=False))

    def learning_seconds(self, way: str, block: Block, data: BlockData) -> list[float]:
        """Seconds of some learning steps; the block ends as it was."""
        with self._learner(way, block, data) as learner:
            return self._timed(way, learner.run)

    @contextmanager
    def _learner(self, way: str, block: Block, data: BlockData) -> Iterator[BlockLearner]:
        kept = {name: value.clone() for name, value in block.quantized_block.state_dict().items()}
        schedule = replace(self.schedule, iterations=self._steps(way)[0])
        generator = torch.Generator().manual_seed(0)
        learner = BlockLearner(block, self._read(way, block, data), schedule, generator)
        with training(block, schedule.quant_prob, learner.drops):
            yield learner
        block.quantized_block.load_state_dict(kept)
        block.quantized_block.zero_grad(set_to_none=True)

    def _read(self, way: str, block: Block, data: BlockData) -> BlockData:
        return data if way == _OURS else ObviousData(self.passes[way], block, self.images.to(self.device))

    def _timed(self, way: str, run: Callable[[Tick], object]) -> list[float]:
        ends = [_now(self.device)]
        with nullcontext() if way == _OURS else obvious_way(self.blocks):
            run(lambda *_: ends.append(_now(self.device)))
        return [after - before for before, after in pairwise(ends)][self._steps(way)[1] :]

    def _steps(self, way: str) -> tuple[int, int]:
        return (_STEPS_OF_OURS if way == _OURS else _STEPS)[self.device.type]

    def difference(self, block: Block, data: BlockData) -> float:
        """How far the other ways' first steps are from ours at most, as a share.

        That is of each term's gradient at T(x) and of the loss that a learning step finds. In one layout: in
        another sums round otherwise, and values at the border of two codes fall on the other side.
        """
        ours, *others = (self._first(way, block, data) for way in _WAYS)
        found = [
            float((a - b).norm() / b.norm().clamp(min=1e-20))
            for other in others
            for a, b in zip(ours, other, strict=True)
        ]
        if max(found) > _LARGEST_DIFFERENCE:
            raise SystemExit(f"{self.case.name}, block {block.name}: the ways differ: {found}")
        return max(found)

    def _first(self, way: str, block: Block, data: BlockData) -> list[Tensor]:
        """The gradients of a new T's first outer step, and the loss of a first learning step."""
        seen: list[Outer] = []
        outer = BiLevel.outer

        def watched(*args: Any, **options: Any) -> Outer:
            seen.append(outer(*args, **options))
            return seen[-1]

        taught, generator = self.fresh[way](), torch.Generator().manual_seed(0)
        taught.schedule = replace(self.outer, steps=1)
        with nullcontext() if way == _OURS else obvious_way(self.blocks, fast_layout):
            with patch.object(BiLevel, "outer", watched):
                read = self._read(way, block, data)
                taught.learn(block, read, self.schedule, generator=generator, measured=False)
            with self._learner(way, block, data) as learner:
                loss = learner.step(0).detach().clone()
        return [*(gradient.detach().clone() for gradient in seen[0].gradients), loss]


def measure(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """One line per block, then one of the run that they add up to."""
    both = Both(case, device)
    whole = {f"{kind}_{way}": 0.0 for kind in ("outer", "learning") for way in _WAYS}
    on_gpu = device.type == "cuda"
    tensors = dict.fromkeys(_WAYS, 0)
    common = {"model": case.name, "batch": case.batch, "validation": case.validation}
    for block, data in both.walk():
        compared = case.network is not None and not block.is_edge
        difference = both.difference(block, data) if compared else None
        found: dict[str, list[float]] = {name: [] for name in whole}
        for _ in range(_ROUNDS):
            for way in _WAYS:
                held = _forget_peak(device) if on_gpu else 0
                found[f"learning_{way}"] += both.learning_seconds(way, block, data)
                if not block.is_edge:
                    found[f"outer_{way}"] += both.outer_seconds(way, block, data)
                if on_gpu:
                    tensors[way] = max(tensors[way], _peak(device) - held)
        seconds = {name: median(values) for name, values in found.items() if values}
        for name, value in seconds.items():
            whole[name] += value
        yield {**common, "block": block.name, **_rounded(seconds), "difference": difference}
    yield {
        **common,
        "block": None,
        "outer_steps": _PUBLISHED_OUTER_STEPS,
        "iterations": both.schedule.iterations,
        **_rounded(whole),
        "replayed": on_gpu and GraphedStep.possible,
        "memory_mib": tensors if on_gpu else {way: _memory_apart(case, way) for way in _WAYS},
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in seconds.items()}


def memory(case: Case, way: str, device: torch.device) -> int:
    """MiB that outer and learning steps of all blocks take at most, beside what the networks take."""
    both = Both(case, device)
    held = _forget_peak(device)
    for block, data in both.walk():
        if not block.is_edge:
            both.outer_seconds(way, block, data)
        both.learning_seconds(way, block, data)
    return _peak(device) - held


def _forget_peak(device: torch.device) -> int:
    """What is held now, in MiB; from here on the peak counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 2**10


def _memory_apart(case: Case, way: str) -> int:
    command = [sys.executable, __file__, "--case", case.name, "--way", way]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(out.splitlines()[-1])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure every case, or one way's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="this network alone, printed and not kept")
    parser.add_argument("--way", choices=_WAYS, help="print the memory of this way alone; wants --case")
    arguments = parser.parse_args()
    device, lines = pick_device("auto"), []
    names = [case.name for case in _CASES[device.type]]
    if arguments.case not in (None, *names) or (arguments.way and not arguments.case):
        parser.error(f"--case: {' or '.join(names)}")
    cases = [c for c in _CASES[device.type] if arguments.case in (None, c.name)]
    keep_freed_memory()
    if arguments.way:
        print(memory(cases[0], arguments.way, device))
        return
    for case in cases:
        for line in measure(case, device):
            lines.append({**line, "machine": machine()})
            print(lines[-1], flush=True)
    if arguments.case:
        return
    RESULTS.mkdir(exist_ok=True)
    name = "meta_speed_gpu.jsonl" if device.type == "cuda" else "meta_speed.jsonl"
    (RESULTS / name).write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
