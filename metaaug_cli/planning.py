"""What a run will do, before it does anything: blocks, bits, memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from metaaug_cli.augmentation.augmenter import AugmenterSpec
from metaaug_cli.augmentation.bilevel import MetaSchedule
from metaaug_cli.augmentation.learned import LearnedAugmentation
from metaaug_cli.graph.stages import stage_macs
from metaaug_cli.layout import fast_layout
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.quantization.blocks import Block, Chain, search_activation_scales
from metaaug_cli.quantization.cache import BlockData, Stream, stage_bytes
from metaaug_cli.quantization.reconstruct import BlockLearner, Schedule, training
from metaaug_cli.recipe.augment_kinds import NONE

_TIMED_BATCHES = (4, 8)  # on a CPU, which takes long for a whole one
# The first warms up, and others may be slowed by the machine's other work; a GPU replays from the fifth on.
_TIMED_STEPS = {"cpu": 3, "cuda": 8}


@dataclass(frozen=True)
class PlanRow:
    """One block of the plan.

    Args:
        block: Its name.
        layers: Convolutions and linear layers in it.
        parameters: Weights and biases of them.
        weight_bits: Bits of their weights, ascending and distinct.
        act_bits: Bits of the activation grids it owns, ascending and distinct.
        macs: Multiply-accumulates of one image.
        cache_bytes: Activations kept while it is learned.
        seconds: Estimated learning time; None where nothing is learned.
        augmenter_seconds: Estimated time in which it teaches the augmenter; None where it does not.
    """

    block: str
    layers: int
    parameters: int
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    macs: int
    cache_bytes: int
    seconds: float | None
    augmenter_seconds: float | None = None


@dataclass(frozen=True)
class TeachingPlan:
    """What the time of teaching the learned augmenter depends on.

    Args:
        spec: The augmenter's form and width.
        schedule: Outer steps for each block that is not the first or last.
        preprocessing: Of the network.
    """

    spec: AugmenterSpec
    schedule: MetaSchedule
    preprocessing: Preprocessing


def plan_run(
    chain: Chain,
    schedule: Schedule,
    *,
    images: int,
    device: torch.device,
    copies: int = 0,
    teaching: TeachingPlan | None = None,
) -> list[PlanRow]:
    """Describe every block; the time comes from training steps of each on four random images.

    Args:
        chain: From ``prepare.prepare_chain``.
        schedule: Of each block.
        images: Calibration images.
        device: Where the run would be.
        copies: Of all images together; the first block does without learned ones.
        teaching: The learned augmenter's, where the run has one.
    """
    chain.to(device)
    rows = []
    trial = _Trial(chain, teaching, device) if teaching is not None else None
    for block in chain.blocks:
        layers = block.stage.layers
        copied = teaching is None or block.index > 0
        parameters = sum(a.meta["val"].numel() for n in layers for a in n.args[1:3] if hasattr(a, "meta"))  # type: ignore[union-attr]
        rows.append(
            PlanRow(
                block=block.name,
                layers=len(layers),
                parameters=parameters,
                weight_bits=tuple(sorted({q.bits for q in block.weights.values()})),
                act_bits=tuple(sorted({q.bits for q in block.activations.values()})),
                macs=stage_macs(block.stage),
                cache_bytes=stage_bytes(block.stage, images + (copies if copied else 0)),
                seconds=_learning_seconds(block, schedule, device) if schedule.iterations else None,
                augmenter_seconds=trial.seconds(block, schedule) if trial and not block.is_edge else None,
            )
        )
    return rows


def _learning_seconds(block: Block, schedule: Schedule, device: torch.device) -> float:
    timed = {
        batch: _step_seconds(block, replace(schedule, batch_size=batch), device)
        for batch in _timed_batches(schedule.batch_size, device)
    }
    return _extrapolated(timed, schedule.batch_size) * schedule.iterations


def _step_seconds(block: Block, schedule: Schedule, device: torch.device) -> float:
    """The fastest of a few training steps on random inputs; the block ends as it was."""
    data = _random_data(block, schedule.batch_size, device)
    search_activation_scales(block, data.quantized_stream.batch(torch.arange(schedule.batch_size)))
    kept = {name: value.clone() for name, value in block.quantized_block.state_dict().items()}
    learner = BlockLearner(
        block,
        data,
        replace(schedule, iterations=_TIMED_STEPS[device.type]),
        torch.Generator().manual_seed(0),
    )
    ends: list[float] = [_now(device)]
    with training(block, schedule.quant_prob, learner.drops):
        learner.run(lambda *_: ends.append(_now(device)))
    block.quantized_block.load_state_dict(kept)
    block.quantized_block.zero_grad(set_to_none=True)
    return min(after - before for before, after in pairwise(ends))


def _timed_batches(batch_size: int, device: torch.device) -> list[int]:
    """A GPU takes little longer for a whole batch; on a CPU two small ones tell what a larger one adds."""
    if device.type == "cuda" or batch_size <= max(_TIMED_BATCHES):
        return [batch_size]
    return list(_TIMED_BATCHES)


def _extrapolated(timed: dict[int, float], size: int) -> float:
    """Seconds at ``size`` from those at one or two others: a part that stays, and one that grows with it."""
    (few, least), (more, most) = min(timed.items()), max(timed.items())
    slope = max(most - least, 0.0) / (more - few) if more > few else 0.0
    return most + slope * (size - more)


def _random_data(block: Block, count: int, device: torch.device) -> BlockData:
    shapes = [value.meta["val"].shape[1:] for value in block.stage.inputs]
    inputs = tuple(fast_layout(torch.rand(count, *map(int, shape), device=device)) for shape in shapes)
    stream = Stream(inputs, device)
    with torch.no_grad():
        targets = block.float_block(*inputs)
    return BlockData(stream, stream, block.float_block, targets, block.computed)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Trial:
    """Augmenters that are thrown away, each taught by a few images for timing."""

    def __init__(self, chain: Chain, teaching: TeachingPlan, device: torch.device) -> None:
        self.schedule, self.device = teaching.schedule, device
        largest = max(self.schedule.batch_size, self.schedule.val_batch_size)
        self.learned = [self._learned(chain, teaching, batch) for batch in _timed_batches(largest, device)]

    def _learned(self, chain: Chain, teaching: TeachingPlan, batch: int) -> LearnedAugmentation:
        few = replace(
            self.schedule,
            steps=_TIMED_STEPS[self.device.type],
            batch_size=min(self.schedule.batch_size, batch),
            val_batch_size=min(self.schedule.val_batch_size, batch),
        )
        return LearnedAugmentation(
            teaching.spec,
            few,
            chain.blocks,
            torch.rand(batch, teaching.preprocessing.channels, *teaching.preprocessing.size),
            teaching.preprocessing,
            operations=NONE,
            copies=1,
            seed=0,
            device=self.device,
        )

    def seconds(self, block: Block, schedule: Schedule) -> float:
        """Teaching time of ``block``, which the blocks before it must have been searched for."""
        timed = {
            _walked(learned.learner.schedule): self._step_seconds(learned, block, schedule)
            for learned in self.learned
        }
        return _extrapolated(timed, _walked(self.schedule)) * self.schedule.steps

    def _step_seconds(self, learned: LearnedAugmentation, block: Block, schedule: Schedule) -> float:
        ends: list[float] = [_now(self.device)]
        learned.learner.learn(
            block,
            _random_data(block, len(learned.images), self.device),
            schedule,
            generator=torch.Generator().manual_seed(0),
            tick=lambda *_: ends.append(_now(self.device)),
            measured=False,
        )
        return min(after - before for before, after in pairwise(ends))


def _walked(schedule: MetaSchedule) -> int:
    """Images that an outer step walks: T's twice through the network and once back, others once and back."""
    return 2 * schedule.batch_size + schedule.val_batch_size
