"""The training loop's quantizer and loss in few passes over memory, with gradients of their own.

They compute what ``functional.fake_quantize`` and ``losses.reconstruction_loss`` say, but can be
differentiated only once. On the CPU the tensors are worked through in pieces that stay in the processor's
cache, and masks are numbers, since operators on booleans are many times slower there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metaaug_cli.layout import Layout
from metaaug_cli.quantization.drops import Drops

_PIECE = 1 << 15  # elements: some arrays of this size fit into the second-level cache together


def drop_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    prob: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each element of ``x`` on the grid with probability ``prob``, else as it is (QDrop, ICLR 2022, eq. 4).

    The gradient to ``x`` is 0 where a quantized element is outside the grid's range and 1 elsewhere; to
    ``scale`` it is that of LSQ (ICLR 2020, eq. 3) on the quantized elements. Differentiable once.

    Args:
        x: Any shape.
        scale: ().
        zero_point: (), a whole number.
        bits: Grid width, 2 to 8.
        prob: In steps of 1/256.
        generator: On ``x``'s device; draws what ``drops.drop_mask`` draws.
    """
    drops = Drops.draw(x, prob, generator)
    result = _DropFakeQuantize.apply(x, scale, zero_point, bits, drops, torch.is_grad_enabled())
    assert isinstance(result, Tensor)
    return result


def squared_error(outputs: Tensor, targets: Tensor, axis: int) -> Tensor:
    """Squared error summed over channels, averaged over batch and positions (BRECQ, ICLR 2021, eq. 10).

    Args:
        outputs: (N, …) of the quantized block; the gradient goes to them alone.
        targets: Same shape.
        axis: The dimension of the channels.
    """
    result = _SquaredError.apply(outputs, targets, axis)
    assert isinstance(result, Tensor)
    return result


class _DropFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        drops: Drops | None,
        learns: bool,
    ) -> Tensor:
        ctx.layout = layout = Layout.of(x)
        flat = layout.flat(x)
        result = torch.empty_like(flat)
        to_x, to_scale = (learns and wanted for wanted in ctx.needs_input_grad[:2])
        passes = torch.empty_like(flat, dtype=torch.uint8) if to_x else None
        slopes = torch.empty_like(flat) if to_scale else None
        low, high = _ends(zero_point, bits)
        for piece in _pieces(flat):
            before = flat[piece]
            scaled = before / scale
            rounded = torch.round(scaled)
            codes = rounded.clamp(low, high)
            mask = drops.quantized(piece, before) if drops is not None else None
            if slopes is not None:
                _write_slopes(slopes[piece], scaled, rounded, codes, mask)
            if passes is not None:
                inside = torch.eq(rounded, codes, out=passes[piece])
                if drops is not None:
                    inside.bitwise_or_(drops.kept(piece, inside))
            if mask is None:
                torch.mul(codes, scale, out=result[piece])
            else:
                torch.lerp(before, codes.mul_(scale), mask, out=result[piece])
        ctx.save_for_backward(passes, slopes)
        return layout.shaped(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        passes, slopes = ctx.saved_tensors
        flat = ctx.layout.flat(grad)
        to_x = None
        if passes is not None:
            passed = torch.empty_like(flat)
            for piece in _pieces(flat):
                torch.mul(flat[piece], passes[piece].to(flat.dtype), out=passed[piece])
            to_x = ctx.layout.shaped(passed)
        return to_x, None if slopes is None else torch.dot(flat, slopes), None, None, None, None


def _write_slopes(out: Tensor, scaled: Tensor, rounded: Tensor, codes: Tensor, mask: Tensor | None) -> None:
    """The derivative by the scale: mask * (codes - inside * scaled)."""
    inside = torch.eq(rounded, codes, out=torch.empty_like(codes))
    torch.addcmul(codes, inside, scaled, value=-1.0, out=out)
    if mask is not None:
        out.mul_(mask)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor, axis: int) -> Tensor:
        ctx.layout = layout = Layout.of(outputs)
        found, wanted = layout.flat(outputs), layout.flat(targets)
        difference = torch.empty_like(found)
        sums = []
        for piece in _pieces(found):
            part = torch.sub(found[piece], wanted[piece], out=difference[piece])
            sums.append(torch.dot(part, part))
        ctx.save_for_backward(difference)
        ctx.terms = outputs.numel() // outputs.shape[axis]
        return torch.stack(sums).sum() / ctx.terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return ctx.layout.shaped(difference * (2.0 * grad / ctx.terms)), None, None


def _pieces(flat: Tensor) -> Iterator[slice]:
    """The whole of a flat tensor, on the CPU in parts that fit its cache."""
    step = _PIECE if flat.device.type == "cpu" else max(flat.numel(), 1)
    return (slice(start, start + step) for start in range(0, flat.numel(), step))


def _ends(zero_point: Tensor, bits: int) -> tuple[Any, Any]:
    """Least and greatest code minus zero point: numbers on the CPU, tensors where reading one would wait."""
    if zero_point.device.type == "cpu":
        return -float(zero_point), 2**bits - 1 - float(zero_point)
    return -zero_point, 2**bits - 1 - zero_point
