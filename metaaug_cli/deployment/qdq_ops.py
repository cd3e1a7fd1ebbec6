"""The four operators of a deployed network, and how each is written in ONNX.

The deployed network holds integer codes and float scales. Its forward runs the same operators in eager
PyTorch and in the exported file, so what is measured is what is shipped. Activation codes lie in an
unsigned 8-bit container whatever their bit-width; codes under 8 bits are clipped there, which ONNX Runtime
runs between its integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CONTAINER_MAX = 255


@torch.library.custom_op("metaaug::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """Quantize to unsigned codes and dequantize again.

    Args:
        x: Any float tensor.
        scale: Step size, 0-dim float32, positive.
        zero_point: Code of the value 0, inside ``[quant_min, quant_max]``.
        quant_min: Least code, at least 0.
        quant_max: Greatest code, at most 255.
    """
    return dequantize_codes(quantize_codes(x, scale, zero_point, quant_min, quant_max), scale, zero_point)


def quantize_codes(x: Tensor, scale: Tensor, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """The codes of ``fake_quantize`` as whole float numbers (ties to even, like ONNX QuantizeLinear)."""
    return torch.round(x / scale).add_(zero_point).clamp_(quant_min, quant_max)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """The float values of codes given as whole float numbers."""
    return (codes - zero_point) * scale


@torch.library.custom_op("metaaug::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights from int8 codes whose zero points are already subtracted.

    Args:
        codes: int8, output channels on axis 0.
        scale: float32, one per output channel.
    """
    return codes.to(scale.dtype) * scale.reshape(-1, *([1] * (codes.dim() - 1)))


@torch.library.custom_op("metaaug::dequantize_bias", mutates_args=())
def dequantize_bias(codes: Tensor, scale: Tensor) -> Tensor:
    """A bias from int32 codes on the grid ``scale = input scale * weight scale`` of each channel.

    Args:
        codes: int32, one per output channel.
        scale: float32, one per output channel.
    """
    return codes.to(scale.dtype) * scale


@torch.library.custom_op("metaaug::global_average_pool", mutates_args=())
def global_average_pool(x: Tensor) -> Tensor:
    """Mean over height and width, (N, C, H, W) to (N, C, 1, 1); ONNX Runtime has an integer kernel for it."""
    return x.mean(dim=(2, 3), keepdim=True)


@fake_quantize.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@dequantize_bias.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@global_average_pool.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How ``torch.onnx.export`` writes these operators, as its ``custom_translation_table``."""
    import numpy as np
    from onnx import numpy_helper
    from onnxscript import opset21 as op

    def constant(value: int, dtype: type, shape: tuple[int, ...] = ()) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.full(shape, value, dtype)))

    def to_qdq(x: Any, scale: Any, zero_point: int, quant_min: int, quant_max: int) -> Any:
        codes = op.QuantizeLinear(x, scale, constant(zero_point, np.uint8))
        if (quant_min, quant_max) != (0, CONTAINER_MAX):
            codes = op.Clip(codes, constant(quant_min, np.uint8), constant(quant_max, np.uint8))
        return op.DequantizeLinear(codes, scale, constant(zero_point, np.uint8))

    def to_weight(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    def to_bias(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    def to_global_average_pool(x: Any) -> Any:
        return op.GlobalAveragePool(x)

    ops = torch.ops.metaaug
    return {
        ops.fake_quantize.default: to_qdq,
        ops.dequantize_weight.default: to_weight,
        ops.dequantize_bias.default: to_bias,
        ops.global_average_pool.default: to_global_average_pool,
    }
