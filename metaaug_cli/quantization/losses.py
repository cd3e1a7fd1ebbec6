"""Losses of block reconstruction and of the augmenter, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_TEMPERATURE = 4.0
_SMALLEST = 1e-12


def reconstruction_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    """Squared error summed over channels, averaged over batch and positions (BRECQ, ICLR 2021, eq. 10).

    Args:
        outputs: Tensors (N, …) of the quantized block.
        targets: The full-precision block's, same shapes.
        axes: The dimension of the channels in each: 1 behind a convolution, the last behind a linear layer.
    """
    each = zip(outputs, targets, axes, strict=True)
    return torch.stack([(o - t).square().sum(axis).mean() for o, t, axis in each]).sum()


def rounding_regularizer(softs: Sequence[Tensor], beta: float | Tensor) -> Tensor:
    """Sum of 1 - |2h - 1|^beta, which pushes soft roundings h to 0 or 1 (AdaRound, ICML 2020, eq. 24)."""
    return torch.stack([(1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum() for h in softs]).sum()


def annealed_beta(step: int, steps: int, *, warmup: float, start: float, end: float) -> float | None:
    """Exponent of the rounding regularizer at ``step``; None while it is off (the first ``warmup`` share)."""
    first = warmup * steps
    if step < first:
        return None
    share = (step - first) / max(steps - first, 1.0)
    return end + (start - end) * (1.0 - share)


def logit_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits), both softened by a temperature of 4, batch mean (MetaAug, ECCV 2024, eq. 10).

    Args:
        reference: (N, classes) of the full-precision network.
        logits: (N, classes).
    """
    wanted, found = (F.log_softmax(x / _TEMPERATURE, -1) for x in (reference, logits))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def squared_distance(x: Tensor, changed: Tensor) -> Tensor:
    """Mean (changed - x)^2 over everything, in the images' squared units."""
    return (changed - x).square().mean()


def similarity_divergence(features: Tensor, changed: Tensor) -> Tensor:
    """Probabilistic knowledge transfer between two sets of features (Passalis & Tefas, ECCV 2018).

    Cosine similarities within the batch, mapped to [0, 1] and normalised row by row, are distributions p (of
    ``features``) and q (of ``changed``); the result is the mean of p * log(p / q) over all N^2 entries.

    Args:
        features: (N, D) of the images.
        changed: (N, D) of the augmented images.
    """
    p, q = _neighbours(features), _neighbours(changed)
    return (p * torch.log(p / q)).mean()


def _neighbours(features: Tensor) -> Tensor:
    unit = F.normalize(features.flatten(1), dim=1)
    similarity = ((unit @ unit.T + 1.0) / 2.0).clamp(min=_SMALLEST)
    return similarity / similarity.sum(1, keepdim=True)
