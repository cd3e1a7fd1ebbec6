"""Losses of block reconstruction as pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reconstruction_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error summed over channels, averaged over batch and positions (BRECQ, ICLR 2021, eq. 10).

    Args:
        outputs: Tensors (N, C, …) of the quantized block.
        targets: The full-precision block's, same shapes.
    """
    return torch.stack([(o - t).square().sum(1).mean() for o, t in zip(outputs, targets, strict=True)]).sum()


def rounding_regularizer(softs: Sequence[Tensor], beta: float) -> Tensor:
    """Sum of 1 - |2h - 1|^beta, which pushes soft roundings h to 0 or 1 (AdaRound, ICML 2020, eq. 24)."""
    return torch.stack([(1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum() for h in softs]).sum()


def annealed_beta(step: int, steps: int, *, warmup: float, start: float, end: float) -> float | None:
    """Exponent of the rounding regularizer at ``step``; None while it is off (the first ``warmup`` share)."""
    first = warmup * steps
    if step < first:
        return None
    share = (step - first) / max(steps - first, 1.0)
    return end + (start - end) * (1.0 - share)
