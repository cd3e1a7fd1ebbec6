"""What a run will do, before it does anything: blocks, bits, memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from metaaug_cli.augmentation.augmenter import AugmenterSpec
from metaaug_cli.augmentation.bilevel import MetaSchedule
from metaaug_cli.augmentation.learned import LearnedAugmentation
from metaaug_cli.graph.stages import stage_macs
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.quantization.blocks import Block, Chain, search_activation_scales
from metaaug_cli.quantization.cache import BlockData, Stream, Values, stage_bytes
from metaaug_cli.quantization.reconstruct import Schedule, training_step_runs
from metaaug_cli.recipe.augment_kinds import NONE

_TIMED_BATCH = 4
_TIMED_STEPS = 3  # the first one warms up, and others may be slowed by the machine's other work


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
    inputs = _random_inputs(block, device)
    search_activation_scales(block, inputs)
    fastest = min(_timed_step(block, inputs, schedule) for _ in range(_TIMED_STEPS))
    return fastest * schedule.iterations * schedule.batch_size / _TIMED_BATCH


def _random_inputs(block: Block, device: torch.device) -> Values:
    shapes = [value.meta["val"].shape[1:] for value in block.stage.inputs]
    return tuple(torch.rand(_TIMED_BATCH, *map(int, shape), device=device) for shape in shapes)


def _timed_step(block: Block, inputs: Values, schedule: Schedule) -> float:
    start = time.perf_counter()
    training_step_runs(block, inputs, schedule)
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class _Trial:
    """An augmenter that is thrown away, taught by a few images for timing."""

    def __init__(self, chain: Chain, teaching: TeachingPlan, device: torch.device) -> None:
        self.schedule, self.device = teaching.schedule, device
        few = replace(teaching.schedule, steps=1, batch_size=_TIMED_BATCH, val_batch_size=_TIMED_BATCH)
        size = (teaching.preprocessing.channels, *teaching.preprocessing.size)
        self.learned = LearnedAugmentation(
            teaching.spec,
            few,
            chain.blocks,
            torch.rand(_TIMED_BATCH, *size),
            teaching.preprocessing,
            operations=NONE,
            copies=1,
            seed=0,
            device=device,
        )

    def seconds(self, block: Block, schedule: Schedule) -> float:
        """Teaching time of ``block``, which the blocks before it must have been searched for."""
        stream = Stream(_random_inputs(block, self.device), self.device)
        data = BlockData(stream, stream, block.float_block, None, block.computed)
        generator = torch.Generator().manual_seed(0)
        taught = [
            self.learned.learner.learn(block, data, schedule, generator=generator, measured=False)
            for _ in range(_TIMED_STEPS)
        ]
        fastest = min(history.seconds for history in taught)
        # T's images walk twice through the network and once back, the others once and back.
        share = (2 * self.schedule.batch_size + self.schedule.val_batch_size) / (3 * _TIMED_BATCH)
        return fastest * self.schedule.steps * share
