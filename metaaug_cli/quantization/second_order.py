"""Rounding one weight after the other, each making up for the error of those before it: the arithmetic.

GPTQ (Frantar et al., ICLR 2023) after Optimal Brain Surgeon: with H = sum of x xᵀ over a layer's input
patches x, the output error of weights Q for W is tr((W - Q) H (W - Q)ᵀ). Columns are rounded in the order of
falling H_jj; what rounding one costs is taken off the columns still to come. Everything here is batched over
convolution groups and in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the searched scale. It minimises the weights' own error, but the output's error may prefer another.
SCALE_FACTORS = (1.0, 1.3, 1.15, 0.9, 0.8, 0.7)
POWERS_OF_TWO = (1.0, 2.0, 0.5)
_DAMPING = 0.01
_PULL = 0.3
_COLUMNS = 64
_LARGEST_CHUNK = 1 << 24


def corrected_weight(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The float weight that gives, on quantized inputs, most nearly what ``weight`` gives on float ones.

    Asymmetric calibration as in GPTAQ (Li et al., ICML 2025): argmin over T of
    sum |T x_q - W x_fp|^2 + p |T - W|^2, with p a share of the mean of H's diagonal.

    Args:
        weight: (groups, rows, k) W.
        hessian: (groups, k, k) sum of x_q x_qᵀ.
        cross: (groups, k, k) sum of x_fp x_qᵀ.
    """
    pull = _PULL * _size(hessian)
    wanted = weight.double() @ cross.double() + pull * weight.double()
    system = hessian.double() + pull * torch.eye(hessian.shape[-1], dtype=torch.float64, device=weight.device)
    return torch.linalg.solve(system, wanted, left=False)


def compensated_codes(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    factors: tuple[float, ...] = SCALE_FACTORS,
) -> tuple[Tensor, Tensor]:
    """Codes, and for each row the scale among ``factors`` times the given one, with the least output error.

    Args:
        weight: (groups, rows, k).
        hessian: (groups, k, k) sum of x xᵀ over input patches.
        scale: (groups, rows), positive.
        zero_point: (groups, rows).
        bits: Grid width, 2 to 8.
        factors: Of ``scale``, tried for each row.

    Returns:
        Signed codes (groups, rows, k), code minus zero point, and scales (groups, rows); float64.
    """
    upper, order = _elimination(hessian)
    ordered = _columns(weight.double(), order)
    limits = -zero_point.double(), 2**bits - 1 - zero_point.double()
    rows = max(1, _LARGEST_CHUNK // (len(factors) * weight.shape[0] * weight.shape[2]))
    found = []
    for part in torch.arange(weight.shape[1], device=weight.device).split(rows):
        low, high = (limit[:, part].repeat(1, len(factors)) for limit in limits)
        tried = torch.cat([scale[:, part].double() * factor for factor in factors], 1)
        codes, errors = _eliminate(ordered[:, part].repeat(1, len(factors), 1), upper, tried, low, high)
        found.append(_best(codes, tried, errors, len(factors)))
    codes, scales = (torch.cat(each, 1) for each in zip(*found, strict=True))
    return _columns(codes, order.argsort(dim=1)), scales


def _best(codes: Tensor, scales: Tensor, errors: Tensor, tried: int) -> tuple[Tensor, Tensor]:
    """Of ``tried`` candidates that stand one after the other along the rows, the best for each row."""
    groups, _, k = codes.shape
    best = errors.view(groups, tried, -1).argmin(1, keepdim=True)
    codes = codes.view(groups, tried, -1, k).gather(1, best[..., None].expand(-1, -1, -1, k))
    return codes[:, 0], scales.view(groups, tried, -1).gather(1, best)[:, 0]


def _eliminate(
    weight: Tensor, upper: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Round column by column; returns signed codes and each row's output error. Changes ``weight``."""
    codes = torch.empty_like(weight)
    errors = torch.zeros_like(scale)
    for start in range(0, weight.shape[2], _COLUMNS):
        # A block of columns at a time: what lies beyond it is changed once, by a matrix product.
        end = min(start + _COLUMNS, weight.shape[2])
        missed = torch.empty_like(weight[:, :, start:end])
        for j in range(start, end):
            column = weight[:, :, j]
            code = torch.clamp(torch.round(column / scale), low, high)
            codes[:, :, j] = code
            miss = (column - code * scale) / upper[:, j, j, None]
            weight[:, :, j + 1 : end] -= miss[:, :, None] * upper[:, None, j, j + 1 : end]
            missed[:, :, j - start] = miss
        weight[:, :, end:] -= missed @ upper[:, start:end, end:]
        errors += missed.square().sum(2)
    return codes, errors


def _elimination(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor U of the inverse, H⁻¹ = Uᵀ U, in the order of falling H_jj; and that order."""
    identity = torch.eye(hessian.shape[-1], dtype=torch.float64, device=hessian.device)
    h = hessian.double() / _size(hessian)
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    h = _columns(_columns(h, order).transpose(1, 2), order)
    damping = _DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex(h + damping * identity)
        if not bool(failed.any()):
            break
        damping *= 10
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), order


def _columns(rows: Tensor, order: Tensor) -> Tensor:
    """(groups, rows, k) with its columns in each group's ``order`` (groups, k)."""
    return rows.gather(2, order[:, None].expand_as(rows))


def _size(hessian: Tensor) -> Tensor:
    """(groups, 1, 1) mean of the diagonal; 1 for a group whose inputs are all 0, which keeps its weights."""
    mean = hessian.double().diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(mean > 0, mean, 1.0)[:, None, None]
