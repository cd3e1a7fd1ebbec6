"""Integer arithmetic of the operators in a deployed graph, for ``simulation``.

A handler takes an operator's arguments and returns its integer result, or None where the operator has no
integer kernel for them and runs on floats; those of hard sigmoid and hard swish return floats. Sums of codes
are exact whole numbers; the float32 operations on the way back to codes are those of ONNX Runtime's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaaug_cli.deployment.qdq_ops import dequantize_bias, dequantize_weight
from metaaug_cli.graph.ops import PASSTHROUGH

aten = torch.ops.aten
_EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class Codes:
    """Activation codes as whole float32 numbers, on the grid ``(codes - zero_point) * scale``."""

    codes: Tensor
    scale: Tensor
    zero_point: int

    def centred(self) -> Tensor:
        """Codes minus zero point."""
        return self.codes - self.zero_point

    def values(self) -> Tensor:
        """Dequantized values."""
        return self.centred() * self.scale

    def same_grid(self, other: Codes) -> bool:
        """Whether equal codes mean equal values."""
        return self.zero_point == other.zero_point and bool(self.scale == other.scale)


@dataclass(frozen=True)
class Parameter:
    """Integer codes of a weight or bias with one scale per output channel."""

    codes: Tensor
    scale: Tensor
    values: Callable[[], Tensor]


@dataclass(frozen=True)
class Pending:
    """A result that is not on a grid yet.

    Args:
        requantize: (scale, zero point) to the steps before rounding, zero point included, and the codes
            before clipping.
        values: The result as floats, for operators that read it without a quantizer between.
    """

    requantize: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    values: Callable[[], Tensor]


def as_tensor(value: Any) -> Any:
    """The float tensor behind any value; other things unchanged."""
    return value.values() if isinstance(value, Codes | Parameter | Pending) else value


def rewrapped(moved: Any, source: Codes) -> Any:
    """Moved codes with the grid they came from; operators with several results give a list."""
    if isinstance(moved, tuple | list):
        return [Codes(part, source.scale, source.zero_point) for part in moved]
    return Codes(moved, source.scale, source.zero_point)


def _accumulated(total: Tensor, scale: Tensor) -> Pending:
    """An exact sum of products and the value of one unit of it, broadcastable."""
    unit = total.to(torch.float32)

    def requantize(out_scale: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
        steps = unit * (scale / out_scale)
        return steps + zero_point, torch.round(steps) + zero_point

    return Pending(requantize, lambda: unit * scale)


def _weight(codes: Tensor, scale: Tensor) -> Parameter:
    return Parameter(codes, scale, lambda: dequantize_weight(codes, scale))


def _bias(codes: Tensor, scale: Tensor) -> Parameter:
    return Parameter(codes, scale, lambda: dequantize_bias(codes, scale))


def _weighted(function: Callable[..., Tensor], channel_axis: int) -> Callable[..., Pending | None]:
    """Handler of a convolution or linear layer."""

    def handler(x: Any, weight: Any, bias: Any = None, *settings: Any, **kwargs: Any) -> Pending | None:
        bias_is_integer = bias is None or isinstance(bias, Parameter)
        if not (isinstance(x, Codes) and isinstance(weight, Parameter) and bias_is_integer):
            return None
        codes, inputs = weight.codes, x.centred()
        largest = inputs.abs().amax() * codes.flatten(1).float().abs().sum(1).amax()
        if bias is not None:
            largest = largest + bias.codes.abs().amax()
        dtype = torch.float32 if float(largest) < _EXACT_IN_FLOAT32 and x.codes.is_cpu else torch.float64
        total = function(inputs.to(dtype), codes.to(dtype), None, *settings, **kwargs)
        shape = [1] * total.dim()
        shape[channel_axis] = -1
        if bias is not None:
            total = total + bias.codes.to(dtype).view(shape)
        return _accumulated(total, (x.scale * weight.scale).view(shape))

    return handler


def _relu(x: Any) -> Pending | None:
    if not isinstance(x, Pending):
        return None

    def requantize(scale: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
        steps, codes = x.requantize(scale, zero_point)
        return steps, codes.clamp(min=zero_point)

    return Pending(requantize, lambda: torch.relu(x.values()))


def _multiply_add(x: Tensor, factor: Tensor, addend: Tensor | float) -> Tensor:
    """Fused multiply-add of float32 numbers: one rounding."""
    return (x.double() * factor.double() + addend).float()


def _add(a: Any, b: Any) -> Pending | None:
    if not (isinstance(a, Codes) and isinstance(b, Codes)):
        return None
    if a.codes.numel() < b.codes.numel():  # a broadcast operand comes second
        a, b = b, a

    def requantize(scale: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
        ratio_a, ratio_b = a.scale / scale, b.scale / scale
        zero_a = torch.tensor(float(a.zero_point), device=scale.device)
        shift = _multiply_add(zero_a, ratio_a, (ratio_b * b.zero_point).double())
        partial = _multiply_add(b.codes, ratio_b, (zero_point - shift).double())
        steps = _multiply_add(a.codes, ratio_a, partial.double())
        return steps, torch.round(steps)

    return Pending(requantize, lambda: a.values() + b.values())


def _multiply(a: Any, b: Any) -> Pending | None:
    if not (isinstance(a, Codes) and isinstance(b, Codes)):
        return None

    def requantize(scale: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
        steps = a.centred() * b.centred() * (a.scale * b.scale / scale) + zero_point
        return steps, torch.round(steps)

    return Pending(requantize, lambda: a.values() * b.values())


def _global_average_pool(x: Any) -> Pending | None:
    if not isinstance(x, Codes):
        return None
    total = x.centred().double().sum((2, 3), keepdim=True).float()
    pixels = x.codes.shape[2] * x.codes.shape[3]

    def requantize(scale: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
        steps = total * (x.scale / (scale * pixels))
        return steps + zero_point, torch.round(steps) + zero_point

    return Pending(requantize, lambda: total * (x.scale / pixels))


def _average_pool(x: Any, *settings: Any, **kwargs: Any) -> Pending | None:
    if not isinstance(x, Codes):
        return None
    mean = aten.avg_pool2d.default(x.values(), *settings, **kwargs)

    def requantize(scale: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
        steps = mean / scale + zero_point
        return steps, torch.round(steps)

    return Pending(requantize, lambda: mean)


def _hard_sigmoid(x: Any) -> Tensor:
    """In ONNX's order of operations: a last bit can move a code, wherever the same input code occurs."""
    return (as_tensor(x) * (1 / 6) + 0.5).clamp(0, 1)


def _hard_swish(x: Any) -> Tensor:
    return as_tensor(x) * _hard_sigmoid(x)


def _concatenate(parts: Any, dim: int = 0) -> Codes | None:
    if not all(isinstance(p, Codes) and p.same_grid(parts[0]) for p in parts):
        return None
    return Codes(torch.cat([p.codes for p in parts], dim), parts[0].scale, parts[0].zero_point)


def _pad(x: Any, pad: list[int], value: float | None = None) -> Codes | None:
    if not isinstance(x, Codes) or value:
        return None
    padded = aten.constant_pad_nd.default(x.codes, pad, float(x.zero_point))
    return Codes(padded, x.scale, x.zero_point)


HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.ops.metaaug.dequantize_weight.default: _weight,
    torch.ops.metaaug.dequantize_bias.default: _bias,
    torch.ops.metaaug.global_average_pool.default: _global_average_pool,
    aten.conv1d.default: _weighted(torch.conv1d, 1),
    aten.conv2d.default: _weighted(torch.conv2d, 1),
    aten.conv2d.padding: _weighted(torch.conv2d, 1),
    aten.linear.default: _weighted(torch.nn.functional.linear, -1),
    aten.relu.default: _relu,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.avg_pool2d.default: _average_pool,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _hard_swish,
    aten.cat.default: _concatenate,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: lambda x, pad, mode="constant", value=None: (
        _pad(x, pad, value) if mode == "constant" else None
    ),
}

MOVES = (PASSTHROUGH - {aten.constant_pad_nd.default}) | {
    aten.flatten.using_ints,
    aten.repeat.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.pixel_unshuffle.default,
    aten.clone.default,
    aten.contiguous.default,
}
"""Operators that do the same to codes as to values; padding is not one, it pads with the zero point."""
