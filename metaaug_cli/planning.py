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
from metaaug_cli.quantization.reconstruct import Schedule, reconstruct_block
from metaaug_cli.recipe.augment_kinds import NONE

_TIMED_BATCH = 4  # on a CPU; a GPU takes little longer for a whole one
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
    batch = _timed_batch(schedule.batch_size, device)
    data = _random_data(block, batch, device)
    search_activation_scales(block, data.quantized_stream.batch(torch.arange(batch)))
    few = replace(schedule, batch_size=batch, iterations=_TIMED_STEPS[device.type])
    kept = {name: value.clone() for name, value in block.quantized_block.state_dict().items()}
    ends: list[float] = [_now(device)]
    reconstruct_block(
        block,
        data,
        few,
        generator=torch.Generator().manual_seed(0),
        tick=lambda *_: ends.append(_now(device)),
    )
    block.quantized_block.load_state_dict(kept)
    fastest = min(after - before for before, after in pairwise(ends))
    return fastest * schedule.iterations * schedule.batch_size / batch


def _timed_batch(batch_size: int, device: torch.device) -> int:
    return batch_size if device.type == "cuda" else min(batch_size, _TIMED_BATCH)


def _random_data(block: Block, count: int, device: torch.device) -> BlockData:
    shapes = [value.meta["val"].shape[1:] for value in block.stage.inputs]
    inputs = tuple(torch.rand(count, *map(int, shape), device=device) for shape in shapes)
    stream = Stream(tuple(map(fast_layout, inputs)), device)
    return BlockData(stream, stream, block.float_block, None, block.computed)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Trial:
    """An augmenter that is thrown away, taught by a few images for timing."""

    def __init__(self, chain: Chain, teaching: TeachingPlan, device: torch.device) -> None:
        self.schedule, self.device = teaching.schedule, device
        self.few = replace(
            self.schedule,
            steps=_TIMED_STEPS[device.type],
            batch_size=_timed_batch(self.schedule.batch_size, device),
            val_batch_size=_timed_batch(self.schedule.val_batch_size, device),
        )
        self.images = max(self.few.batch_size, self.few.val_batch_size)
        self.learned = LearnedAugmentation(
            teaching.spec,
            self.few,
            chain.blocks,
            torch.rand(self.images, teaching.preprocessing.channels, *teaching.preprocessing.size),
            teaching.preprocessing,
            operations=NONE,
            copies=1,
            seed=0,
            device=device,
        )

    def seconds(self, block: Block, schedule: Schedule) -> float:
        """Teaching time of ``block``, which the blocks before it must have been searched for."""
        data = _random_data(block, self.images, self.device)
        generator = torch.Generator().manual_seed(0)
        ends = [_now(self.device)]
        self.learned.learner.learn(
            block,
            data,
            schedule,
            generator=generator,
            tick=lambda *_: ends.append(_now(self.device)),
            measured=False,
        )
        fastest = min(after - before for before, after in pairwise(ends))
        # T's images walk twice through the network and once back, the others once and back.
        whole, timed = (2 * s.batch_size + s.val_batch_size for s in (self.schedule, self.few))
        return fastest * self.schedule.steps * whole / timed
