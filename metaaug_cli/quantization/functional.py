"""The arithmetic of uniform affine quantization: pure functions on tensors, no modules, no state.

Codes are unsigned, 0 … 2^bits - 1, with an integer zero point; a value is ``scale * (code - zero_point)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8
_CLIP_RATIOS = 100
_ZETA, _GAMMA = 1.1, -0.1
_SQRT_HALF = 0.5**0.5


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Codes of ``x`` as floats: clamp(round(x / scale) + zero_point, 0, 2^bits - 1), ties to even."""
    return torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Values of codes: (codes - zero_point) * scale."""
    return (codes - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Quantize then dequantize in float, with a straight-through round (LSQ: Esser et al., ICLR 2020).

    The gradient is 1 to ``x`` inside the grid's range and 0 outside; to ``scale`` it is round(x/s) - x/s
    inside and the grid's end outside. Differentiable twice.
    """
    codes = round_ste(x / scale)
    clamped = codes.detach().clamp(0 - zero_point, 2**bits - 1 - zero_point)
    # A clamp by tensors would halve the gradient of codes that lie exactly on the grid's ends.
    return torch.where(clamped == codes.detach(), codes, clamped) * scale


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even, with the identity as gradient."""
    return x + (torch.round(x) - x).detach()


def finite_gradient(x: Tensor) -> Tensor:
    """``x`` as it is; a gradient to it that is NaN or infinite becomes 0, element by element."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    x = x.view_as(x)
    x.register_hook(lambda grad: torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0))
    return x


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two in the logarithm, exactly, with the identity as gradient.

    Args:
        scale: Positive and normal, any shape.
    """
    mantissa, exponent = torch.frexp(scale.detach())  # scale = mantissa * 2^exponent, mantissa in [1/2, 1)
    return scale + (_two_to(exponent - (mantissa < _SQRT_HALF).int()) - scale).detach()


def _two_to(exponent: Tensor) -> Tensor:
    """2^exponent built from float32 bits: library powers may be an ulp off."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def soft_rounding(rounding_logits: Tensor) -> Tensor:
    """h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1), the rectified sigmoid of AdaRound (ICML 2020, eq. 23)."""
    return torch.clamp(torch.sigmoid(rounding_logits) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def inverse_soft_rounding(fraction: Tensor) -> Tensor:
    """V with h(V) = ``fraction``, for fractions in [0, 1)."""
    return -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1.0)


def grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that spans [low, high], which always includes 0.

    Args:
        low: Least value, any shape.
        high: Greatest value, same shape.
        bits: Grid width, 2 to 8.
        symmetric: Put the zero point at 0 where nothing is negative, else at 2^(bits - 1).

    Returns:
        Scale (positive, float) and zero point (whole numbers as float), shaped like ``low``.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    levels = 2**bits - 1
    if symmetric:
        half = 2 ** (bits - 1)
        signed = low < 0
        scale = torch.where(signed, torch.maximum(-low / half, high / (half - 1)), high / levels)
        zero_point = torch.where(signed, torch.full_like(low, half), torch.zeros_like(low))
        return scale.clamp(min=SMALLEST_SCALE), zero_point
    scale = ((high - low) / levels).clamp(min=SMALLEST_SCALE)
    return scale, torch.clamp(torch.round(-low / scale), 0, levels)


def search_scale(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    norm: float = 2.4,
    full_range: Tensor | None = None,
    clip: bool = True,
    scale_power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """The clip ratio 1.00 … 0.01 of (min, max) with the least mean |x - fake_quantize(x)|^norm, row by row.

    Args:
        x: (rows, values); each row gets its own scale.
        bits: Grid width, 2 to 8.
        symmetric: See ``grid``.
        norm: Exponent of the error (2.4 in BRECQ and Genie-M).
        full_range: (rows, 2) least and greatest value, where ``x`` is only a sample of the tensor.
        clip: False takes the whole range and searches nothing.
        scale_power_of_two: Try the powers of two at and above each ratio's scale instead.

    Returns:
        Scale (rows,) and zero point (rows,).
    """
    low, high = (x.amin(1), x.amax(1)) if full_range is None else full_range.unbind(1)
    best_error = torch.full_like(low, float("inf"))
    span = _power_of_two_grid if scale_power_of_two else grid
    best_scale, best_zero = span(low, high, bits, symmetric=symmetric)
    for ratio in _ratios() if clip else ():
        scale, zero_point = span(low * ratio, high * ratio, bits, symmetric=symmetric)
        rounded = dequantize(
            quantize(x, scale[:, None], zero_point[:, None], bits), scale[:, None], zero_point[:, None]
        )
        error = (x - rounded).abs_().pow_(norm).mean(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _power_of_two_grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The finest grid with a power of two as its scale that spans [low, high]; see ``grid``."""
    scale, zero_point = grid(low, high, bits, symmetric=symmetric)
    mantissa, exponent = torch.frexp(scale)
    scale = _two_to(exponent - (mantissa == 0.5).int())
    if not symmetric:
        zero_point = torch.clamp(torch.round(-low.clamp(max=0.0) / scale), 0, 2**bits - 1)
    return scale, zero_point


def _ratios() -> Iterator[float]:
    return ((_CLIP_RATIOS - i) / _CLIP_RATIOS for i in range(_CLIP_RATIOS))


def quantize_bias(bias: Tensor, act_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Bias rounded to the int32 grid of the accumulator, scale s_x * s_w per output channel.

    Args:
        bias: (out,) float.
        act_scale: () scale of the layer's input.
        weight_scale: (out,) scales of the layer's weight.
    """
    scale = act_scale * weight_scale
    return round_ste(bias / scale) * scale
