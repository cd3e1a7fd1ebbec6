"""Operators that the evaluator of the onnx package gets wrong, for ``reference``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from metaaug_cli.verification.reference_ops import Array, attributes


def transposed_convolution(node: onnx.NodeProto, inputs: list[Any]) -> Array | None:
    """A transposed convolution in float32; None where its padding is not symmetric."""
    x, weight, bias = ([_tensor(i) for i in inputs] + [None])[:3]
    assert x is not None
    assert weight is not None
    a = attributes(node)
    rank = weight.dim() - 2
    pads = a.get("pads") or [0] * (2 * rank)
    named = a.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET")
    if rank not in (1, 2) or named or a.get("output_shape") or pads[:rank] != pads[rank:]:
        return None
    convolve = F.conv_transpose1d if rank == 1 else F.conv_transpose2d
    return convolve(
        x,
        weight,
        bias,
        stride=list(a.get("strides") or [1] * rank),
        padding=list(pads[:rank]),
        output_padding=list(a.get("output_padding") or [0] * rank),
        groups=int(a.get("group", 1)),
        dilation=list(a.get("dilations") or [1] * rank),
    ).numpy()


def group_normalization(node: onnx.NodeProto, inputs: list[Any]) -> Array:
    """Group normalization with one scale and bias per channel (opset 21)."""
    x, scale, bias = (_tensor(i) for i in inputs)
    assert x is not None
    a = attributes(node)
    return F.group_norm(x, int(a["num_groups"]), scale, bias, eps=float(a.get("epsilon", 1e-5))).numpy()


def constant_pad(node: onnx.NodeProto, inputs: list[Any]) -> Array | None:
    """A constant border of codes or floats, cut off where it is negative; None for other modes and axes."""
    x, pads, fill, axes = (inputs + [None] * 3)[:4]
    if attributes(node).get("mode", b"constant") not in (b"constant", "constant") or axes is not None:
        return None
    ends = np.asarray(pads).reshape(2, -1).T
    value = 0 if fill is None else np.asarray(fill).item()
    wider = np.pad(x, np.maximum(ends, 0), constant_values=value)
    kept = (
        slice(max(-before, 0), size - max(-after, 0))
        for (before, after), size in zip(ends, wider.shape, strict=True)
    )
    return np.ascontiguousarray(wider[tuple(kept)])


def nearest_resize(node: onnx.NodeProto, inputs: list[Any]) -> Array | None:
    """Codes or floats repeated as torch counts; None for other modes, and for sizes instead of scales."""
    a = attributes(node)
    wanted = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    found = {key: a[key].decode() if isinstance(a.get(key), bytes) else a.get(key) for key in wanted}
    if found != wanted or len(inputs) < 3 or inputs[2] is None or np.size(inputs[2]) == 0:
        return None
    x = inputs[0]
    for axis, scale in enumerate(np.asarray(inputs[2], np.float32)):
        places = np.arange(int(np.floor(x.shape[axis] * scale)), dtype=np.float32) / scale
        x = np.take(x, np.minimum(places.astype(np.int64), x.shape[axis] - 1), axis)
    return x


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.tensor(np.asarray(value))
