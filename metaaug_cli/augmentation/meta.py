"""Learning the augmenter T block by block: outer steps on T (MetaAug: Pham et al., ECCV 2024).

T is learned so that what a block learns from T(x) works on the original images. The outer gradient flows from
the logits of validation images to T(x) (``bilevel.py``), and from there once through T.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from metaaug_cli.augmentation.augmenter import Augmenter
from metaaug_cli.augmentation.bilevel import BiLevel, MetaSchedule, inner_mode
from metaaug_cli.augmentation.passes import Passes, Views
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData
from metaaug_cli.quantization.reconstruct import Schedule, Tick

TERMS = ("validation", "margin", "preservation")
_RECORDS = 25
_SMALLEST = 1e-20
_NORM_MEMORY = 0.9
_PUBLISHED_WEIGHTS = (5.0, 0.5, 3e4)
_SHARES = (1.0, 3.0, 0.3)  # of the terms' usual gradient norms, at the published weights


@dataclass(frozen=True)
class MetaRecord:
    """One recorded outer step.

    ``gradients`` are norms at T's parameters of each weighted term, as in ``TERMS``; ``distance`` is mean
    (T(x) - x)^2; ``validation_before`` and ``validation`` are L_val at the block's parameters before and
    after the inner step.
    """

    step: int
    validation_before: float
    validation: float
    preservation: float
    distance: float
    gradients: tuple[float, float, float]


@dataclass
class MetaHistory:
    """What learning T for one block did."""

    seconds: float = 0.0
    records: list[MetaRecord] = field(default_factory=list)


class MetaLearner:
    """T's optimizer and the steps that one block teaches it; T and its optimizer live on from block to block.

    Args:
        augmenter: T, in evaluation mode.
        passes: The chain's prefixes and rest.
        images: (N, C, H, W) originals, on the CPU.
        views: The float network's features and logits of them.
        schedule: Outer steps.
    """

    def __init__(
        self, augmenter: Augmenter, passes: Passes, images: Tensor, views: Views, schedule: MetaSchedule
    ) -> None:
        self.augmenter, self.passes, self.images, self.views = augmenter, passes, images, views
        self.schedule = schedule
        self.parameters = list(augmenter.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=schedule.lr)
        self.running_norms = torch.zeros(len(TERMS), device=augmenter.low.device)
        self.balanced_steps = 0

    def learn(
        self,
        block: Block,
        data: BlockData,
        inner: Schedule,
        *,
        generator: torch.Generator,
        tick: Tick | None = None,
        measured: bool = True,
    ) -> MetaHistory:
        """Teach T for ``block``, whose own parameters end as they were.

        Args:
            block: Scales searched, not yet learned; all blocks before it are frozen.
            data: Inputs of the block for the original images.
            inner: The block's schedule: rates, drops and the regulariser of the inner loss.
            generator: CPU generator of batches, drops and the policy's directions.
            tick: Called with (step, steps).
            measured: Record some of the steps, which makes those slower.
        """
        started = time.monotonic()
        history = MetaHistory()
        every = max(1, self.schedule.steps // _RECORDS)
        drops = self._drops(generator)
        bilevel = BiLevel(block, self.passes, inner, self.schedule, self.augmenter.radius, drops)
        with inner_mode(block, inner.quant_prob, drops):
            for step in range(self.schedule.steps):
                if step % self.schedule.restart_every == 0:
                    bilevel.restart()
                record = self._step(bilevel, data, generator, step, recorded=measured and step % every == 0)
                if record is not None:
                    history.records.append(record)
                if tick is not None:
                    tick(step + 1, self.schedule.steps)
        history.seconds = time.monotonic() - started
        return history

    def _drops(self, generator: torch.Generator) -> torch.Generator:
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.Generator(device=self.augmenter.low.device).manual_seed(seed)

    def _step(
        self,
        bilevel: BiLevel,
        data: BlockData,
        generator: torch.Generator,
        step: int,
        *,
        recorded: bool,
    ) -> MetaRecord | None:
        device = self.augmenter.low.device
        count = len(self.images)
        chosen = _draw(count, self.schedule.batch_size, generator)
        validation = _draw(count, self.schedule.val_batch_size, generator)
        x = self.images[chosen].to(device)
        made = self.augmenter(x, generator)
        h_val = data.quantized_stream.batch(validation)
        outer = bilevel.outer(
            x, made.detach(), self.views.of(chosen), h_val, self.views.of(validation), measure=recorded
        )
        weighted = self._weighted(outer.gradients)
        norms = self._norms(made, weighted) if recorded else (0.0, 0.0, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        made.backward(torch.stack(weighted).sum(0))
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.grad_clip)
        self.optimizer.step()
        if not recorded:
            return None
        return MetaRecord(
            step,
            outer.validation_before,
            float(outer.validation),
            float(outer.preservation),
            float(outer.distance),
            norms,
        )

    def _weighted(self, gradients: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        s = self.schedule
        weights = (s.val_weight, s.margin_weight, s.preserve_weight)
        if not s.balanced:
            return [w * g for w, g in zip(weights, gradients, strict=True)]
        self.balanced_steps += 1
        weighted = []
        for term, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            norm = gradient.norm()
            running = self.running_norms[term].mul_(_NORM_MEMORY).add_((1 - _NORM_MEMORY) * norm)
            usual = running / (1 - _NORM_MEMORY**self.balanced_steps)
            share = _SHARES[term] * weight / _PUBLISHED_WEIGHTS[term]
            weighted.append(gradient * (share / usual.clamp(min=_SMALLEST)))
        return weighted

    def _norms(self, made: Tensor, weighted: list[Tensor]) -> tuple[float, float, float]:
        found = []
        for gradient in weighted:
            at_t = torch.autograd.grad(
                made, self.parameters, gradient, retain_graph=True, materialize_grads=True
            )
            squares = [float(g.square().sum()) for g in at_t]
            found.append(math.sqrt(sum(squares)))
        return found[0], found[1], found[2]


def _draw(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Different images while there are enough of them, else some twice."""
    if wanted <= count:
        return torch.randperm(count, generator=generator)[:wanted]
    return torch.randint(count, (wanted,), generator=generator)
