"""Float operators that the evaluator of the onnx package gets wrong, for ``reference``."""

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


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.tensor(np.asarray(value))
