"""Block reconstruction: fit one quantized block to its full-precision original (BRECQ, QDrop, Genie-M)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaaug_cli.errors import InputError, MetaAugError
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData, Values
from metaaug_cli.quantization.drops import drop_mask
from metaaug_cli.quantization.fused import squared_error
from metaaug_cli.quantization.graphed import Step, recorded_steps
from metaaug_cli.quantization.losses import annealed_beta, rounding_regularizer

_RATE_BUDGET = 5_000
_LARGEST_RATE_FACTOR = 25.0
LEAST_LEARNED_FACTOR = 0.05
_CURVE_POINTS = 100
PROBE_IMAGES = 256
_CHUNK = 64

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
        Losses before (with the codes and scales it starts from) and after, on up to 256 images; the curve.

    Raises:
        InputError: The full-precision block gives NaN or infinite values for some of the images.
        MetaAugError: Learning this block or one before it ended in such values.
    """
    started = time.monotonic()
    probe = torch.arange(min(len(data), PROBE_IMAGES))
    before = probe_loss(block, data, probe)
    if not math.isfinite(before):
        raise _not_finite(block, data, probe)
    if schedule.iterations == 0:
        return BlockHistory(before, before, time.monotonic() - started)
    learner = BlockLearner(block, data, schedule, generator)
    with training(block, schedule.quant_prob, learner.drops):
        curve = learner.run(tick)
    after = probe_loss(block, data, probe)
    if not math.isfinite(after):
        raise _diverged(block)
    return BlockHistory(before, after, time.monotonic() - started, curve)


def _not_finite(block: Block, data: BlockData, indices: Tensor) -> MetaAugError:
    """Whose fault it is that a block is given or gives NaN: the images', or that of blocks learned before."""
    for part in indices.split(_CHUNK):
        if not all(bool(t.isfinite().all()) for t in data.batch(part)[2]):
            return InputError(
                f"block {block.name}: NaN or infinite values for some of the images",
                hint="leave those images out, or check the weights and how images are prepared "
                "(--mean, --std)",
            )
    return _diverged(block)


def _diverged(block: Block) -> MetaAugError:
    return MetaAugError(
        f"block {block.name}: learning ended in NaN or infinite values, here or in a block before it",
        hint="start afresh with another --out and lower learning rates (--set reconstruction.lr_scale=1), or "
        "learn less: --method adaround learns roundings alone, --method gptq nothing",
    )


@torch.no_grad()
def probe_loss(block: Block, data: BlockData, indices: Tensor, chunk: int = _CHUNK) -> float:
    """Reconstruction loss of the block as deployed (hard rounding, no dropping) on some images."""
    total = 0.0
    for part in indices.split(chunk):
        _, h_q, targets = data.batch(part)
        outputs = block.quantized_block(*h_q)
        found = [outputs[i] for i in block.computed]
        total += float(_loss(found, targets, block.channel_axes)) * len(part)
    return total / len(indices)


def _loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    each = zip(outputs, targets, axes, strict=True)
    return torch.stack([squared_error(output, target, axis) for output, target, axis in each]).sum()


def mix(quantized: Values, full_precision: Values, quant_prob: float, generator: torch.Generator) -> Values:
    """QDrop's input mix: each element from the quantized stream with probability ``quant_prob``."""
    if quant_prob >= 1.0:
        return quantized
    pairs = zip(quantized, full_precision, strict=True)
    return tuple(torch.lerp(fp, q, drop_mask(q, quant_prob, generator)) for q, fp in pairs)


class BlockLearner:
    """One block's optimizer, random streams and steps.

    Args:
        block: In ``training`` while steps are taken.
        data: Inputs and targets.
        schedule: Steps, rates and switches.
        generator: CPU generator; draws the batches and, through a derived one, the drops.
    """

    def __init__(self, block: Block, data: BlockData, schedule: Schedule, generator: torch.Generator) -> None:
        self.block, self.data, self.schedule, self.generator = block, data, schedule, generator
        device = data.float_stream.device
        seed = int(torch.randint(2**62, (), generator=generator))
        self.drops = torch.Generator(device=device).manual_seed(seed)
        self.scales: list[Tensor] = [q.relative_scale for q in block.weights.values()]
        self.scales += [q.relative_scale for q in block.activations.values()]
        self.on_gpu = device.type == "cuda"
        # What changes from step to step stands in tensors, so that a recorded step sees it.
        self.beta = torch.tensor(schedule.beta_start, device=device)
        self.pressure = torch.tensor(0.0, device=device)
        groups = self._groups(device)
        self.optimizer = torch.optim.Adam(groups, fused=self.on_gpu, capturable=self.on_gpu)
        self.decayed = self.optimizer.param_groups[1:]
        self.rates = [float(group["lr"]) for group in self.decayed]
        self.recorded: Step | None = None

    def _groups(self, device: torch.device) -> list[dict[str, Any]]:
        weights, activations = self.block.weights.values(), self.block.activations.values()
        s = self.schedule
        groups: list[dict[str, Any]] = [
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
        for group in groups if self.on_gpu else ():
            group["lr"] = torch.tensor(group["lr"], device=device)
        return groups

    def run(self, tick: Tick | None) -> list[tuple[int, float]]:
        """All steps; returns the curve (step, reconstruction loss)."""
        steps = self.schedule.iterations
        every = max(1, steps // _CURVE_POINTS)
        kept: list[tuple[int, Tensor]] = []
        with self.replaying():
            for step in range(steps):
                loss = self.step(step)
                if step % every == 0:
                    kept.append((step, loss.clone()))
                if tick is not None:
                    tick(step + 1, steps)
        return [(step, float(loss)) for step, loss in kept]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """On a GPU, record a step and replay it from then on."""
        if not self.on_gpu:
            yield
            return
        with recorded_steps(self._update_flat, generators=[self.drops]) as (self.recorded,):
            yield
        self.recorded = None
        self.optimizer.zero_grad(set_to_none=True)  # the gradients lie in the recording's memory

    def step(self, step: int) -> Tensor:
        """One optimizer step on one batch; its reconstruction loss, ()."""
        schedule = self.schedule
        self._set_rates(0.5 * (1.0 + math.cos(math.pi * step / schedule.iterations)))
        beta = annealed_beta(
            step,
            schedule.iterations,
            warmup=schedule.rounding_warmup,
            start=schedule.beta_start,
            end=schedule.beta_end,
        )
        h_fp, h_q, targets = self.data.batch(self.data.draw(schedule.batch_size, self.generator))
        if self.recorded is None:
            return self._update(h_fp, h_q, targets, beta, schedule.rounding_weight)
        if beta is not None:
            self.beta.fill_(beta)
            self.pressure.fill_(schedule.rounding_weight)
        return self.recorded([*h_fp, *h_q, *targets])

    def _set_rates(self, share: float) -> None:
        for group, rate in zip(self.decayed, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share

    def _update_flat(self, tensors: Sequence[Tensor]) -> Tensor:
        inputs = len(self.block.stage.inputs)
        h_fp, h_q, targets = tensors[:inputs], tensors[inputs : 2 * inputs], tensors[2 * inputs :]
        return self._update(tuple(h_fp), tuple(h_q), tuple(targets), self.beta, self.pressure)

    def _update(
        self,
        h_fp: Values,
        h_q: Values,
        targets: Values,
        beta: float | Tensor | None,
        pressure: float | Tensor,
    ) -> Tensor:
        outputs = self.block.quantized_block(*mix(h_q, h_fp, self.schedule.quant_prob, self.drops))
        found = [outputs[i] for i in self.block.computed]
        loss = reconstruction = _loss(found, targets, self.block.channel_axes)
        if beta is not None:
            softs = [q.rounding() for q in self.block.weights.values()]
            loss = reconstruction + pressure * rounding_regularizer(softs, beta)
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
