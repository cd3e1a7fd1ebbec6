"""What a run will do, before it does anything: blocks, bits, memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from metaaug_cli.blocks import Block, Chain, search_activation_scales
from metaaug_cli.cache import stage_bytes
from metaaug_cli.reconstruct import Schedule, training_step_runs
from metaaug_cli.stages import stage_macs

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
    """

    block: str
    layers: int
    parameters: int
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    macs: int
    cache_bytes: int
    seconds: float | None


def plan_run(chain: Chain, schedule: Schedule, *, images: int, device: torch.device) -> list[PlanRow]:
    """Describe every block; the time comes from training steps of each on four random images.

    Args:
        chain: From ``prepare.prepare_chain``.
        schedule: Of each block.
        images: Calibration images.
        device: Where the run would be.
    """
    chain.to(device)
    rows = []
    for block in chain.blocks:
        layers = block.stage.layers
        parameters = sum(a.meta["val"].numel() for n in layers for a in n.args[1:3] if hasattr(a, "meta"))  # type: ignore[union-attr]
        rows.append(
            PlanRow(
                block=block.name,
                layers=len(layers),
                parameters=parameters,
                weight_bits=tuple(sorted({q.bits for q in block.weights.values()})),
                act_bits=tuple(sorted({q.bits for q in block.activations.values()})),
                macs=stage_macs(block.stage),
                cache_bytes=stage_bytes(block.stage, images),
                seconds=_learning_seconds(block, schedule, device) if schedule.iterations else None,
            )
        )
    return rows


def _learning_seconds(block: Block, schedule: Schedule, device: torch.device) -> float:
    inputs = tuple(
        torch.rand(_TIMED_BATCH, *(int(s) for s in value.meta["val"].shape[1:]), device=device)
        for value in block.stage.inputs
    )
    search_activation_scales(block, inputs)
    fastest = min(_timed_step(block, inputs, schedule) for _ in range(_TIMED_STEPS))
    return fastest * schedule.iterations * schedule.batch_size / _TIMED_BATCH


def _timed_step(block: Block, inputs: tuple[Tensor, ...], schedule: Schedule) -> float:
    start = time.perf_counter()
    training_step_runs(block, inputs, schedule)
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
