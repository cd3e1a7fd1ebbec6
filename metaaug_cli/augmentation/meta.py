"""Learning the augmenter T block by block: outer steps on T (MetaAug: Pham et al., ECCV 2024).

T is learned so that what a block learns from T(x) works on the original images. The outer gradient flows from
the logits of validation images to T(x) (``bilevel.py``), and from there once through T.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from metaaug_cli.augmentation.augmenter import Augmenter, moved
from metaaug_cli.augmentation.bilevel import BiLevel, MetaSchedule, inner_mode
from metaaug_cli.augmentation.passes import Passes, Views
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData
from metaaug_cli.quantization.graphed import Step, recorded_steps
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
        self.device = augmenter.low.device
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.parameters, lr=schedule.lr, fused=on_gpu, capturable=on_gpu)
        self.running_norms = torch.zeros(len(TERMS), device=self.device)
        self.balanced_steps = torch.zeros((), dtype=torch.float64, device=self.device)

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
        every = max(1, self.schedule.steps // _RECORDS)
        drops = self._drops(generator)
        bilevel = BiLevel(block, self.passes, inner, self.schedule, self.augmenter.radius, drops)
        records: list[tuple[int, Tensor]] = []
        with inner_mode(block, inner.quant_prob, drops), self._steps(bilevel, drops) as (plain, measuring):
            for step in range(self.schedule.steps):
                if step % self.schedule.restart_every == 0:
                    bilevel.restart()
                measures = measured and step % every == 0
                values = (measuring if measures else plain)(self._inputs(data, generator))
                if measures:
                    records.append((step, values.clone()))
                if tick is not None:
                    tick(step + 1, self.schedule.steps)
        found = [_record(step, values.tolist()) for step, values in records]
        return MetaHistory(time.monotonic() - started, found)

    def _drops(self, generator: torch.Generator) -> torch.Generator:
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.Generator(device=self.device).manual_seed(seed)

    @contextmanager
    def _steps(self, bilevel: BiLevel, drops: torch.Generator) -> Iterator[tuple[Step, Step]]:
        """A step, and one that also measures; on a GPU recorded, if all start from the same parameters."""
        plain, measuring = (partial(self._step, bilevel, measure=measure) for measure in (False, True))
        if self.device.type != "cuda" or self.schedule.restart_every != 1:
            yield plain, measuring
            return
        with recorded_steps(plain, measuring, generators=[drops]) as (replayed, replayed_measuring):
            yield replayed, replayed_measuring
        self.optimizer.zero_grad(set_to_none=True)  # the gradients lie in the recordings' memory

    def _inputs(self, data: BlockData, generator: torch.Generator) -> list[Tensor]:
        """One step's images, the float network's views of them, what T draws, and the validation images'."""
        count = len(self.images)
        chosen = _draw(count, self.schedule.batch_size, generator)
        validation = _draw(count, self.schedule.val_batch_size, generator)
        draws = moved(self.augmenter.draw(len(chosen), generator), self.device)
        x = self.images[chosen].to(self.device, non_blocking=True)
        views, val_views = self.views.of(chosen), self.views.of(validation)
        h_val = data.quantized_stream.batch(validation)
        return [x, views.features, views.logits, val_views.features, val_views.logits, *draws, *h_val]

    def _step(self, bilevel: BiLevel, inputs: Sequence[Tensor], *, measure: bool) -> Tensor:
        """One outer step; where it measures, what ``MetaRecord`` holds, (7,), else the first four of that."""
        x, *seen = inputs
        views, val_views, rest = Views(*seen[:2]), Views(*seen[2:4]), seen[4:]
        inputs_of_block = len(bilevel.block.stage.inputs)
        draws, h_val = tuple(rest[:-inputs_of_block]), tuple(rest[-inputs_of_block:])
        if self.schedule.restart_every == 1:
            bilevel.restart()
        made = self.augmenter(x, draws)
        outer = bilevel.outer(x, made.detach(), views, h_val, val_views, measure=measure)
        weighted = self._weighted(outer.gradients)
        values = [outer.validation_before, outer.validation, outer.preservation, outer.distance]
        if measure:
            values += [self._norm(made, gradient) for gradient in weighted]
        self.optimizer.zero_grad(set_to_none=True)
        made.backward(torch.stack(weighted).sum(0))
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.grad_clip)
        self.optimizer.step()
        return torch.stack([value.detach().double() for value in values])

    def _weighted(self, gradients: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        s = self.schedule
        weights = (s.val_weight, s.margin_weight, s.preserve_weight)
        if not s.balanced:
            return [w * g for w, g in zip(weights, gradients, strict=True)]
        self.balanced_steps += 1.0
        corrected = (1 - _NORM_MEMORY**self.balanced_steps).float()
        weighted = []
        for term, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            norm = gradient.norm()
            running = self.running_norms[term].mul_(_NORM_MEMORY).add_((1 - _NORM_MEMORY) * norm)
            usual = running / corrected
            share = _SHARES[term] * weight / _PUBLISHED_WEIGHTS[term]
            weighted.append(gradient * (share / usual.clamp(min=_SMALLEST)))
        return weighted

    def _norm(self, made: Tensor, gradient: Tensor) -> Tensor:
        """Norm at T's parameters of a gradient at T(x); ()."""
        at_t = torch.autograd.grad(made, self.parameters, gradient, retain_graph=True, materialize_grads=True)
        return torch.stack([g.square().sum() for g in at_t]).double().sum().sqrt()


def _record(step: int, values: list[float]) -> MetaRecord:
    before, validation, preservation, distance, *gradients = values
    to_val, to_margin, to_preserve = gradients
    return MetaRecord(step, before, validation, preservation, distance, (to_val, to_margin, to_preserve))


def _draw(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Different images while there are enough of them, else some twice."""
    if wanted <= count:
        return torch.randperm(count, generator=generator)[:wanted]
    return torch.randint(count, (wanted,), generator=generator)
