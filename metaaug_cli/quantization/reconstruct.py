"""Block reconstruction: fit one quantized block to its full-precision original (BRECQ, QDrop, Genie-M)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData, Values
from metaaug_cli.quantization.drops import drop_mask
from metaaug_cli.quantization.fused import squared_error
from metaaug_cli.quantization.losses import annealed_beta, rounding_regularizer

_RATE_BUDGET = 5_000
_LARGEST_RATE_FACTOR = 25.0
LEAST_LEARNED_FACTOR = 0.05
_CURVE_POINTS = 100
PROBE_IMAGES = 256

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Schedule:
    """How one block is learned; rates are Adam's at the published 20 000 iterations.

    The scale rates are relative to each searched scale, so that they mean the same for 2 and 8 bits and
    before and after batch-norm folding; the published 1e-4 and 4e-5 are absolute, on unfolded weights.

    Args:
        iterations: Optimizer steps; 0 learns nothing.
        batch_size: Images per step.
        quant_prob: QDrop's chance that an element is quantized, for the input mix and inside the block.
        rate_factor: Multiplies the three rates.
        learn_weight_scale: Genie-M learns it, AdaRound, BRECQ and QDrop do not.
        learn_act_scale: All but AdaRound do (LSQ).
    """

    iterations: int
    batch_size: int = 32
    quant_prob: float = 0.5
    rounding_lr: float = 1e-3
    weight_scale_lr: float = 1e-3
    act_scale_lr: float = 1e-4
    rate_factor: float = 1.0
    rounding_weight: float = 1.0
    rounding_warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    learn_weight_scale: bool = True
    learn_act_scale: bool = True


@dataclass
class BlockHistory:
    """What learning a block did: reconstruction loss before and after, and the training curve.

    ``losses`` holds the loss after learning by image set: ``trained`` (originals and copies), ``originals``
    and, where images were held back, ``held_back``; ``augmentation`` what the learned augmenter was like.
    """

    loss_before: float
    loss_after: float
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    augmentation: dict[str, float] = field(default_factory=dict)


def rate_factor(iterations: int) -> float:
    """Factor on the published rates for a schedule of ``iterations``: rates belong to the schedule's length.

    ``factor * iterations`` is held at 5 000 between 200 and 5 000 iterations (25 to 1 times the rates).
    """
    return min(_LARGEST_RATE_FACTOR, max(1.0, _RATE_BUDGET / max(iterations, 1)))


def reconstruct_block(
    block: Block, data: BlockData, schedule: Schedule, *, generator: torch.Generator, tick: Tick | None = None
) -> BlockHistory:
    """Learn the block's roundings and scales so that its outputs match the full-precision block's.

    Args:
        block: Its quantizers are updated in place and end hard-rounded.
        data: Inputs and targets.
        schedule: Steps, rates and switches.
        generator: CPU generator; draws the batches and, through a derived one, the drops.
        tick: Called with (step, steps).

    Returns:
        Losses before (searched scales, nearest rounding) and after, on up to 256 images, and the curve.
    """
    started = time.monotonic()
    probe = torch.arange(min(len(data), PROBE_IMAGES))
    before = probe_loss(block, data, probe)
    if schedule.iterations == 0:
        return BlockHistory(before, before, time.monotonic() - started)
    learner = _Learner(block, data, schedule, generator)
    with training(block, schedule.quant_prob, learner.drops):
        curve = learner.run(tick)
    after = probe_loss(block, data, probe)
    return BlockHistory(before, after, time.monotonic() - started, curve)


@torch.no_grad()
def probe_loss(block: Block, data: BlockData, indices: Tensor, chunk: int = 64) -> float:
    """Reconstruction loss of the block as deployed (hard rounding, no dropping) on some images."""
    total = 0.0
    for part in indices.split(chunk):
        _, h_q, targets = data.batch(part)
        outputs = block.quantized_block(*h_q)
        total += float(_loss([outputs[i] for i in block.computed], targets)) * len(part)
    return total / len(indices)


def _loss(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return torch.stack([squared_error(o, t) for o, t in zip(outputs, targets, strict=True)]).sum()


def mix(quantized: Values, full_precision: Values, quant_prob: float, generator: torch.Generator) -> Values:
    """QDrop's input mix: each element from the quantized stream with probability ``quant_prob``."""
    if quant_prob >= 1.0:
        return quantized
    pairs = zip(quantized, full_precision, strict=True)
    return tuple(torch.lerp(fp, q, drop_mask(q, quant_prob, generator)) for q, fp in pairs)


def training_step_runs(block: Block, inputs: Values, schedule: Schedule) -> None:
    """One forward and backward pass of a training step, for timing; changes nothing."""
    drops = torch.Generator(device=inputs[0].device).manual_seed(0)
    targets = block.float_block(*inputs)
    with training(block, schedule.quant_prob, drops):
        outputs = block.quantized_block(*mix(inputs, inputs, schedule.quant_prob, drops))
        kept = [outputs[i] for i in block.computed], [targets[i] for i in block.computed]
        regularizer = rounding_regularizer([q.rounding() for q in block.weights.values()], schedule.beta_end)
        (_loss(*kept) + regularizer).backward()
    block.quantized_block.zero_grad(set_to_none=True)


class _Learner:
    """One block's optimizer, random streams and loop."""

    def __init__(self, block: Block, data: BlockData, schedule: Schedule, generator: torch.Generator) -> None:
        self.block, self.data, self.schedule, self.generator = block, data, schedule, generator
        device = data.float_stream.device
        seed = int(torch.randint(2**62, (), generator=generator))
        self.drops = torch.Generator(device=device).manual_seed(seed)
        self.scales: list[Tensor] = [q.relative_scale for q in block.weights.values()]
        self.scales += [q.relative_scale for q in block.activations.values()]
        self.optimizer = torch.optim.Adam(self._groups())
        self.decayed = self.optimizer.param_groups[1:]
        self.rates = [group["lr"] for group in self.decayed]

    def _groups(self) -> list[dict[str, object]]:
        weights, activations = self.block.weights.values(), self.block.activations.values()
        s = self.schedule
        groups: list[dict[str, object]] = [
            {"params": [q.rounding_logits for q in weights], "lr": s.rounding_lr * s.rate_factor}
        ]
        if s.learn_weight_scale:
            groups.append(
                {"params": [q.relative_scale for q in weights], "lr": s.weight_scale_lr * s.rate_factor}
            )
        if s.learn_act_scale and activations:
            groups.append(
                {"params": [q.relative_scale for q in activations], "lr": s.act_scale_lr * s.rate_factor}
            )
        return groups

    def run(self, tick: Tick | None) -> list[tuple[int, float]]:
        steps = self.schedule.iterations
        every = max(1, steps // _CURVE_POINTS)
        recorded: list[tuple[int, Tensor]] = []
        for step in range(steps):
            for group, rate in zip(self.decayed, self.rates, strict=True):
                group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            loss = self._step(step)
            if step % every == 0:
                recorded.append((step, loss))
            if tick is not None:
                tick(step + 1, steps)
        return [(step, float(loss)) for step, loss in recorded]

    def _step(self, step: int) -> Tensor:
        schedule = self.schedule
        indices = self.data.draw(schedule.batch_size, self.generator)
        h_fp, h_q, targets = self.data.batch(indices)
        outputs = self.block.quantized_block(*mix(h_q, h_fp, schedule.quant_prob, self.drops))
        reconstruction = _loss([outputs[i] for i in self.block.computed], targets)
        beta = annealed_beta(
            step,
            schedule.iterations,
            warmup=schedule.rounding_warmup,
            start=schedule.beta_start,
            end=schedule.beta_end,
        )
        loss = reconstruction
        if beta is not None:
            regularizer = rounding_regularizer([q.rounding() for q in self.block.weights.values()], beta)
            loss = loss + schedule.rounding_weight * regularizer
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_clamp_min_(self.scales, LEAST_LEARNED_FACTOR)
        return reconstruction.detach()


@contextmanager
def training(block: Block, quant_prob: float, drops: torch.Generator) -> Iterator[None]:
    """Soft rounding and dropping inside the block; hard and undropped again afterwards."""
    for weight in block.weights.values():
        weight.soft = True
    for act in block.activations.values():
        act.quant_prob, act.generator = quant_prob, drops
    try:
        yield
    finally:
        for weight in block.weights.values():
            weight.soft = False
        for act in block.activations.values():
            act.quant_prob, act.generator = 1.0, None
