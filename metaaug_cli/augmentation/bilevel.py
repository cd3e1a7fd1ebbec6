"""One block's bi-level step: a differentiable inner optimizer step, and the outer losses after it.

MetaAug (Pham et al., ECCV 2024, section 3). The gradient of the validation loss runs through the block's
updated quantizers, the inner step and both prefixes to T(x); whether it is alive depends on the inner step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from metaaug_cli.augmentation.passes import Passes, Views
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import Values
from metaaug_cli.quantization.functional import soft_rounding
from metaaug_cli.quantization.losses import (
    annealed_beta,
    logit_divergence,
    reconstruction_loss,
    rounding_regularizer,
    similarity_divergence,
    squared_distance,
)
from metaaug_cli.quantization.reconstruct import LEAST_LEARNED_FACTOR, Schedule, mix, training

_ADAM_EPS = 1e-8
_SECOND_MOMENT = 0.99
_DAMPING = 0.1
_SMALLEST = 1e-20
_LOGITS = "rounding_logits"

Params = dict[str, Tensor]


@dataclass(frozen=True)
class MetaSchedule:
    """How T is learned for one block.

    Args:
        steps: Outer steps.
        batch_size: Images that T changes in a step.
        val_batch_size: Original images that the updated block is validated on.
        lr: Adam's rate for T.
        grad_clip: Largest norm of T's gradient; only matters relative to Adam's running second moment.
        val_weight: lambda 1.
        margin_weight: lambda 2.
        preserve_weight: lambda 3.
        preservation: "dp" (similarity structure of features), "kl" (predictions) or "mse" (features).
        two_sided: Whether the margin also pulls T(x) back from beyond epsilon.
        inner: "adam-fresh" (as released), "preconditioned" or "sgd".
        inner_rate: Factor on the rates of the block's own schedule.
        restart_every: Inner steps before the block's parameters return to their start; 1 as published.
        balanced: Divide each term's gradient at T(x) by its usual norm; the published weights then stand for
            fixed shares.
    """

    steps: int = 500
    batch_size: int = 32
    val_batch_size: int = 64
    lr: float = 5e-6
    grad_clip: float = 0.1
    val_weight: float = 5.0
    margin_weight: float = 0.5
    preserve_weight: float = 3e4
    preservation: str = "dp"
    two_sided: bool = False
    inner: str = "adam-fresh"
    inner_rate: float = 1.0
    restart_every: int = 1
    balanced: bool = False


@dataclass(frozen=True)
class Outer:
    """The three terms of one outer step and their gradients at T(x)."""

    gradients: tuple[Tensor, Tensor, Tensor]
    validation_before: Tensor
    validation: Tensor
    preservation: Tensor
    distance: Tensor


class BiLevel:
    """One block's inner problem: parameters (rounding logits, weight scales, activation scales) and a step.

    Args:
        block: In ``inner_mode``.
        passes: Prefixes and rest.
        inner: Rates, quant_prob and regulariser.
        schedule: The outer settings.
        radius: epsilon in the images' squared units.
        drops: Generator of QDrop's masks, on the block's device.
    """

    def __init__(
        self,
        block: Block,
        passes: Passes,
        inner: Schedule,
        schedule: MetaSchedule,
        radius: float,
        drops: torch.Generator,
    ) -> None:
        self.block, self.passes, self.inner, self.schedule = block, passes, inner, schedule
        self.radius, self.drops = radius, drops
        self.rates = _rates(block, inner, schedule.inner_rate)
        self.start = {
            name: p.detach().clone()
            for name, p in block.quantized_block.named_parameters()
            if name in self.rates
        }
        self.moments = {name: torch.zeros_like(p) for name, p in self.start.items()}
        # Everything that steps change in place stands in tensors: a recorded step repeats what tensors do.
        self.seen = torch.zeros((), dtype=torch.float64, device=drops.device)
        self.position = 0
        self.params: Params = {}
        self.restart()

    def restart(self) -> None:
        """Return the parameters to where the block's learning starts."""
        self.params = {name: p.clone().requires_grad_() for name, p in self.start.items()}
        self.position = 0

    def outer(
        self,
        x: Tensor,
        made: Tensor,
        views: Views,
        h_val: Values,
        val_views: Views,
        *,
        measure: bool = False,
    ) -> Outer:
        """The outer losses for T(x) = ``made`` and their gradients at it; advances the parameters.

        Args:
            x: (N, C, H, W) originals.
            made: Same shape, detached.
            views: The float network's views of ``x``.
            h_val: Quantized inputs of the block for the validation images.
            val_views: The float network's views of the validation images.
            measure: Compute L_val before and after the inner step even where its weight is 0.
        """
        made = made.requires_grad_()
        h_fp, h_q = self.passes.prefixes(made, self.block.index)
        targets = self.block.float_block(*h_fp)
        before = validation = torch.full((), math.nan, device=made.device)
        to_val = torch.zeros_like(made)
        if self.schedule.val_weight or measure:
            if measure:
                with torch.no_grad():
                    before = self.validation(self.params, h_val, val_views)
            updated = self.step(self.training_loss(self.params, h_fp, h_q, targets))
            validation = self.validation(updated, h_val, val_views)
            (to_val,) = torch.autograd.grad(validation, made, retain_graph=True)
            self.params = {name: p.detach().requires_grad_() for name, p in updated.items()}
        preservation = self.preservation(views, self.passes.rest(targets, self.block.index + 1))
        to_preserve = torch.zeros_like(made)
        if self.schedule.preserve_weight:
            (to_preserve,) = torch.autograd.grad(preservation, made)
        distance = squared_distance(x, made)
        (to_margin,) = torch.autograd.grad(self.margin(distance), made)
        return Outer(
            (to_val, to_margin, to_preserve),
            before,
            validation.detach(),
            preservation.detach(),
            distance.detach(),
        )

    def training_loss(self, params: Params, h_fp: Values, h_q: Values, targets: Values) -> Tensor:
        """L_train: reconstruction on T(x) with QDrop, targets detached, plus the rounding regulariser.

        The regulariser is off in the first share of a walk, as in the block's own schedule, and so always
        where ``restart_every`` is 1.
        """
        mixed = mix(h_q, h_fp, self.inner.quant_prob, self.drops)
        outputs = functional_call(self.block.quantized_block, params, mixed)
        found = [outputs[i] for i in self.block.computed]
        wanted = [targets[i].detach() for i in self.block.computed]
        loss = reconstruction_loss(found, wanted, self.block.channel_axes)
        inner = self.inner
        beta = annealed_beta(
            self.position,
            self.schedule.restart_every,
            warmup=inner.rounding_warmup,
            start=inner.beta_start,
            end=inner.beta_end,
        )
        if beta is not None:
            soft = [soft_rounding(p) for name, p in params.items() if name.endswith(_LOGITS)]
            loss = loss + inner.rounding_weight * rounding_regularizer(soft, beta)
        return loss

    def step(self, loss: Tensor) -> Params:
        """One differentiable optimizer step; the result depends on ``loss`` and so on T(x).

        ``adam-fresh`` is lr * g / (|g| + 1e-8), whose derivative by g is almost nowhere alive.
        ``preconditioned`` is lr * P * g with P = 1 / (sqrt(v) + damping) of a running second moment v, a
        constant to the outer gradient. ``sgd`` divides by the group's constant root mean square instead.
        """
        names = list(self.params)
        found = torch.autograd.grad(
            loss, [self.params[n] for n in names], create_graph=True, materialize_grads=True
        )
        self.position += 1
        self.seen += 1.0
        updated = {}
        for name, gradient in zip(names, found, strict=True):
            before = self.params[name]
            updated[name] = before - self.rates[name] * self._direction(name, gradient)
            if not name.endswith(_LOGITS):
                updated[name] = updated[name].clamp(min=LEAST_LEARNED_FACTOR)
        return updated

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        if self.schedule.inner == "adam-fresh":
            return gradient / (gradient.abs() + _ADAM_EPS)
        constant = gradient.detach()
        if self.schedule.inner == "sgd":
            return gradient / constant.square().mean().sqrt().clamp(min=_SMALLEST)
        moment = self.moments[name].mul_(_SECOND_MOMENT).add_(constant.square(), alpha=1 - _SECOND_MOMENT)
        size = (moment / (1 - _SECOND_MOMENT**self.seen).to(moment.dtype)).sqrt()
        damping = _DAMPING * size.square().mean().sqrt()
        return gradient / (size + damping).clamp(min=_SMALLEST)

    def validation(self, params: Params, h_val: Values, views: Views) -> Tensor:
        """L_val: KL of the float logits from those of the updated block followed by the float rest."""
        with _undropped(self.block):
            outputs = functional_call(self.block.quantized_block, params, h_val)
        return logit_divergence(views.logits, self.passes.rest(outputs, self.block.index + 1).logits)

    def margin(self, distance: Tensor) -> Tensor:
        """L_margin: max(0, epsilon - distance) (eq. 14), or the distance of both where it is two-sided."""
        gap = self.radius - distance
        return gap.abs() if self.schedule.two_sided else gap.clamp(min=0.0)

    def preservation(self, views: Views, changed: Views) -> Tensor:
        """L_preserve: what T(x) may not change about x in the float network's eyes."""
        if self.schedule.preservation == "kl":
            return logit_divergence(views.logits, changed.logits)
        if self.schedule.preservation == "mse":
            return squared_distance(views.features, changed.features)
        return similarity_divergence(views.features, changed.features)


def _rates(block: Block, inner: Schedule, factor: float) -> dict[str, float]:
    """Learning rate of every parameter the block learns, by its name in the quantized block."""
    factor *= inner.rate_factor
    rate_of: dict[int, float] = {}
    for weight in block.weights.values():
        rate_of[id(weight.rounding_logits)] = inner.rounding_lr * factor
        if inner.learn_weight_scale:
            rate_of[id(weight.relative_scale)] = inner.weight_scale_lr * factor
    if inner.learn_act_scale:
        for act in block.activations.values():
            rate_of[id(act.relative_scale)] = inner.act_scale_lr * factor
    named = block.quantized_block.named_parameters()
    return {name: rate_of[id(p)] for name, p in named if id(p) in rate_of}


@contextmanager
def inner_mode(block: Block, quant_prob: float, drops: torch.Generator) -> Iterator[None]:
    """Soft rounding and twice differentiable dropping inside the block; as before afterwards."""
    with training(block, quant_prob, drops):
        for act in block.activations.values():
            act.twice_differentiable = True
        try:
            yield
        finally:
            for act in block.activations.values():
                act.twice_differentiable = False


@contextmanager
def _undropped(block: Block) -> Iterator[None]:
    """No dropping, as deployed; differentiable once, which is all that a validation needs."""
    kept = [(act, act.quant_prob, act.twice_differentiable) for act in block.activations.values()]
    for act, _, _ in kept:
        act.quant_prob, act.twice_differentiable = 1.0, False
    try:
        yield
    finally:
        for act, quant_prob, twice_differentiable in kept:
            act.quant_prob, act.twice_differentiable = quant_prob, twice_differentiable
