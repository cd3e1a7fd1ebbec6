"""Integer arithmetic of single operators, for ``reference``.

Each function returns what ONNX Runtime's integer kernel computes, or None where the operator has none for
these inputs and runs in float. Products and sums of codes are exact integers; scales are float32, and
every float32 operation below is one the kernel performs, in its order.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper

Array: TypeAlias = np.ndarray[Any, Any]
_EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class Quantized:
    """Codes with the grid that dequantizes them.

    Args:
        codes: Integer codes.
        scale: float32, 0-dim or one per index of ``axis``.
        zero_point: int64, shaped like ``scale``.
        axis: Axis of per-channel scales.
    """

    codes: Array
    scale: Array
    zero_point: Array
    axis: int

    @property
    def per_tensor(self) -> bool:
        """One scale and one zero point for all codes."""
        return self.scale.size == 1

    def centred(self) -> Array:
        """Codes minus zero point, exactly, as float64."""
        shape = along(self.axis, self.codes.ndim, self.scale.size)
        return self.codes.astype(np.float64) - self.zero_point.reshape(shape)

    def values(self) -> Array:
        """Dequantized float32 values."""
        shape = along(self.axis, self.codes.ndim, self.scale.size)
        return self.centred().astype(np.float32) * self.scale.reshape(shape)


@dataclass(frozen=True)
class Pending:
    """A result that is not yet on a grid.

    Args:
        to_codes: (scale, zero point) to whole numbers, before saturation.
        values: The result in float32, for operators that read it without a quantizer between.
    """

    to_codes: Callable[[np.float32, int], Array]
    values: Callable[[], Array]


Value: TypeAlias = Array | Quantized | Pending


def as_float(value: Any) -> Array:
    """The plain array behind any value."""
    return value.values() if isinstance(value, Quantized | Pending) else value


def along(axis: int, rank: int, size: int) -> tuple[int, ...]:
    """Shape that broadcasts ``size`` values along an axis; all ones for a single value."""
    shape = [1] * rank
    if size > 1:
        shape[axis] = size
    return tuple(shape)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _accumulated(total: Array, scale: Array) -> Pending:
    """An exact integer sum and the float32 step of one unit of it, broadcastable."""
    unit = total.astype(np.float32)

    def to_codes(out_scale: np.float32, zero_point: int) -> Array:
        return np.rint(unit * (scale / out_scale)) + np.float32(zero_point)

    return Pending(to_codes, lambda: unit * scale)


def _on_product_grid(bias: Any, scale: Array) -> bool:
    """Whether a bias can be added to the integer sum: absent, or int32 codes on the product's grid."""
    if bias is None:
        return True
    is_int32 = isinstance(bias, Quantized) and bias.codes.dtype == np.int32 and not bias.zero_point.any()
    return is_int32 and bool(np.allclose(bias.scale, scale.reshape(bias.scale.shape), rtol=1e-5, atol=0))


def convolution(node: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Convolution of any rank: float32(sum) * (s_x * s_w / s_y)."""
    x, weight, bias = (*inputs, None)[:3]
    if not _both_quantized(x, weight):
        return None
    scale = np.broadcast_to(x.scale.reshape(()) * weight.scale.reshape(-1), (weight.codes.shape[0],))
    if not _on_product_grid(bias, scale):
        return None
    a = attributes(node)
    total = _exact_convolution(x.centred(), weight.centred(), a)
    per_channel = along(1, total.ndim, scale.size)
    if bias is not None:
        total = total + bias.codes.astype(np.float64).reshape(per_channel)
    return _accumulated(total, scale.astype(np.float32).reshape(per_channel))


def _both_quantized(x: Any, weight: Any) -> bool:
    return (
        isinstance(x, Quantized) and isinstance(weight, Quantized) and x.per_tensor and weight.axis in (0, 1)
    )


def _exact_convolution(x: Array, weight: Array, a: dict[str, Any]) -> Array:
    """Integer convolution in the narrower float type whose sums are exact.

    NNPACK, and oneDNN on ARM, may choose Winograd's algorithm, whose float32 sums are not exact.
    """
    largest = np.abs(x).max(initial=0) * np.abs(weight).reshape(weight.shape[0], -1).sum(1).max(initial=0)
    narrow = largest < _EXACT_IN_FLOAT32 and platform.machine().lower() in ("x86_64", "amd64")
    dtype = torch.float32 if narrow else torch.float64
    with torch.backends.nnpack.flags(enabled=False):
        total = _convolve(torch.from_numpy(x).to(dtype), torch.from_numpy(weight).to(dtype), None, a)
    return total.double().numpy()


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: dict[str, Any]
) -> torch.Tensor:
    rank = weight.dim() - 2
    pads = a.get("pads", [0] * 2 * rank)
    both_sides = [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])]
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    return function(
        F.pad(x, both_sides), weight, bias, a.get("strides", 1), 0, a.get("dilations", 1), a.get("group", 1)
    )


def float_convolution(node: onnx.NodeProto, inputs: list[Any]) -> Array:
    """A convolution that stays in float32."""
    x, weight, bias = (
        [torch.from_numpy(np.ascontiguousarray(i)) if i is not None else None for i in inputs] + [None]
    )[:3]
    assert x is not None
    assert weight is not None
    return _convolve(x, weight, bias, attributes(node)).numpy()


def gemm(node: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Matrix product with weights (out, in) and an int32 bias."""
    x, weight, bias = (*inputs, None)[:3]
    a = attributes(node)
    plain = (
        not a.get("transA", 0) and a.get("alpha", 1.0) == 1.0 and (bias is None or a.get("beta", 1.0) == 1.0)
    )
    if not plain or not _both_quantized(x, weight):
        return None
    matrix = weight.centred().T if a.get("transB", 0) else weight.centred()
    if weight.scale.size > 1 and weight.axis != (0 if a.get("transB", 0) else 1):
        return None
    scale = np.broadcast_to(x.scale.reshape(()) * weight.scale.reshape(-1), (matrix.shape[1],)).astype(
        np.float32
    )
    if not _on_product_grid(bias, scale):
        return None
    total = x.centred() @ matrix
    if bias is not None:
        total = total + bias.codes.astype(np.float64)
    return _accumulated(total, scale)


def matmul(_: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Matrix product without bias, of two activations or an activation and weights."""
    x, other = inputs
    if not (isinstance(x, Quantized) and isinstance(other, Quantized) and x.per_tensor and other.per_tensor):
        return None
    total = np.matmul(x.centred(), other.centred())
    return _accumulated(total, (x.scale.reshape(()) * other.scale.reshape(())).astype(np.float32))


def relu(_: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """ReLU of a waiting result: codes do not fall below the zero point."""
    (source,) = inputs
    if not isinstance(source, Pending):
        return None
    return Pending(
        lambda scale, zero_point: np.maximum(source.to_codes(scale, zero_point), np.float32(zero_point)),
        lambda: np.maximum(source.values(), 0),
    )


def _multiply_add(x: Array, factor: np.float32, addend: Any) -> Array:
    """Fused multiply-add: one rounding, as the processor's instruction does it."""
    return (x.astype(np.float64) * np.float64(factor) + np.asarray(addend, np.float64)).astype(np.float32)


def add(_: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Sum of two quantized tensors: rint(b * s_b/s_y + constant, then + a * s_a/s_y), fused."""
    a, b = inputs
    if not _both_activations(a, b):
        return None
    if a.codes.size < b.codes.size:  # a broadcast operand comes second
        a, b = b, a

    def to_codes(scale: np.float32, zero_point: int) -> Array:
        ratio_a, ratio_b = np.float32(a.scale.reshape(()) / scale), np.float32(b.scale.reshape(()) / scale)
        zero_a, zero_b = (np.float32(q.zero_point.reshape(())) for q in (a, b))
        shift = _multiply_add(np.asarray(zero_a), ratio_a, np.float32(ratio_b * zero_b))
        partial = _multiply_add(b.codes, ratio_b, np.float32(zero_point) - shift)
        return np.rint(_multiply_add(a.codes, ratio_a, partial))

    return Pending(to_codes, lambda: a.values() + b.values())


def multiply(_: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Product of two quantized tensors: rint(a * b * (s_a * s_b / s_y) + z)."""
    a, b = inputs
    if not _both_activations(a, b):
        return None

    def to_codes(scale: np.float32, zero_point: int) -> Array:
        ratio = np.float32(np.float32(a.scale.reshape(()) * b.scale.reshape(())) / scale)
        product = (a.centred() * b.centred()).astype(np.float32)
        return np.rint(product * ratio + np.float32(zero_point))

    return Pending(to_codes, lambda: a.values() * b.values())


def _both_activations(a: Any, b: Any) -> bool:
    return isinstance(a, Quantized) and isinstance(b, Quantized) and a.per_tensor and b.per_tensor


def global_average_pool(_: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Mean over the image: float32(sum) * (s_x / (s_y * pixels))."""
    (x,) = inputs
    if not (isinstance(x, Quantized) and x.per_tensor):
        return None
    axes = tuple(range(2, x.codes.ndim))
    total = x.centred().sum(axes, keepdims=True).astype(np.float32)
    pixels = np.float32(np.prod(x.codes.shape[2:]))
    scale_in = np.float32(x.scale.reshape(()))

    def to_codes(scale: np.float32, zero_point: int) -> Array:
        return np.rint(total * np.float32(scale_in / np.float32(scale * pixels))) + np.float32(zero_point)

    return Pending(to_codes, lambda: x.values().mean(axes, keepdims=True, dtype=np.float32))


def average_pool(node: onnx.NodeProto, inputs: list[Any]) -> Pending | None:
    """Average over windows: dequantized values summed in float32, rint(mean / s_y + z)."""
    (x,) = inputs
    if not (isinstance(x, Quantized) and x.per_tensor):
        return None
    mean = _float_average_pool(x.values(), attributes(node))
    return Pending(lambda scale, zero_point: np.rint(mean / scale + np.float32(zero_point)), lambda: mean)


def _float_average_pool(x: Array, a: dict[str, Any]) -> Array:
    padded = _padded_for_windows(x, a, np.float32(0))
    inside = _padded_for_windows(np.ones(x.shape[2:], np.float32)[None, None], a, np.float32(0))
    if a.get("count_include_pad", 0):
        begin, end = _paddings(a)
        shape = tuple(n + b + e for n, b, e in zip(x.shape[2:], begin, end, strict=True))
        inside = np.zeros_like(inside)
        spatial: tuple[Any, ...] = (..., *(slice(0, n) for n in shape))
        inside[spatial] = 1
    total: Array | None = None
    count: Array | None = None
    for offset in np.ndindex(*a["kernel_shape"]):
        part, ones = _window(padded, a, offset), _window(inside, a, offset)
        total = part if total is None else total + part
        count = ones if count is None else count + ones
    assert total is not None
    assert count is not None
    return total / count


def max_pool(node: onnx.NodeProto, x: Array) -> Array:
    """Greatest value of each window; padding never wins."""
    a = attributes(node)
    lowest = np.float32(-np.inf) if x.dtype == np.float32 else np.int32(np.iinfo(np.int16).min)
    wide = x if x.dtype == np.float32 else x.astype(np.int32)
    padded = _padded_for_windows(wide, a, lowest)
    windows = (_window(padded, a, offset) for offset in np.ndindex(*a["kernel_shape"]))
    best = next(windows)
    for window in windows:
        best = np.maximum(best, window)
    return best.astype(x.dtype)


def _paddings(a: dict[str, Any]) -> tuple[list[int], list[int]]:
    rank = len(a["kernel_shape"])
    pads = a.get("pads", [0] * 2 * rank)
    return list(pads[:rank]), list(pads[rank:])


def _output_sizes(spatial: tuple[int, ...], a: dict[str, Any]) -> list[int]:
    begin, end = _paddings(a)
    rank = len(begin)
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    sizes = []
    for i, size in enumerate(spatial):
        reach = dilations[i] * (a["kernel_shape"][i] - 1) + 1
        span = size + begin[i] + end[i] - reach
        if a.get("ceil_mode", 0):
            count = -(-span // strides[i]) + 1
            if (count - 1) * strides[i] >= size + begin[i]:
                count -= 1
        else:
            count = span // strides[i] + 1
        sizes.append(count)
    return sizes


def _padded_for_windows(x: Array, a: dict[str, Any], fill: Any) -> Array:
    """Input padded so far that every window, also a last partial one, lies inside."""
    begin, end = _paddings(a)
    rank = len(begin)
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    widths = [(0, 0), (0, 0)]
    for i, count in enumerate(_output_sizes(x.shape[2:], a)):
        needed = (count - 1) * strides[i] + dilations[i] * (a["kernel_shape"][i] - 1) + 1
        widths.append((begin[i], max(end[i], needed - x.shape[2 + i] - begin[i])))
    return np.pad(x, widths, constant_values=fill)


def _window(padded: Array, a: dict[str, Any], offset: tuple[int, ...]) -> Array:
    """The elements at one position of every window."""
    rank = len(offset)
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    slices: list[slice] = []
    for i in range(rank):
        kernel = dilations[i] * (a["kernel_shape"][i] - 1) + 1
        start = offset[i] * dilations[i]
        count = (padded.shape[2 + i] - kernel) // strides[i] + 1
        slices.append(slice(start, start + (count - 1) * strides[i] + 1, strides[i]))
    place: tuple[Any, ...] = (..., *slices)
    return padded[place]


def integer_elementwise(node: onnx.NodeProto, inputs: list[Any]) -> Array:
    """Clip, Cast and Sub on codes."""
    codes = inputs[0]
    if node.op_type == "Clip":
        low, high = (*inputs[1:], None, None)[:2]
        wide = codes.astype(np.int32)
        wide = wide if low is None else np.maximum(wide, int(low))
        wide = wide if high is None else np.minimum(wide, int(high))
        return wide.astype(codes.dtype)
    if node.op_type == "Cast":
        return codes.astype(helper.tensor_dtype_to_np_dtype(attributes(node)["to"]))
    return (codes.astype(np.int32) - inputs[1].astype(np.int32)).astype(codes.dtype)
