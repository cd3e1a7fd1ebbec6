"""What each operator of a captured graph means for quantization.

After ``normalize`` a graph holds only functional ATen operators, each giving one tensor. Every
operator has one role, and the roles alone decide where quantizers go: no operator, module or
architecture is special-cased elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import fx

aten = torch.ops.aten


class Role(Enum):
    """How an operator takes part in an integer graph."""

    WEIGHTED = "weighted"  # convolution or linear: has weight codes and an int32 bias
    ACTIVATION = "activation"  # ReLU-like clamp that the following quantizer absorbs
    PASSTHROUGH = "passthrough"  # moves or selects values, so codes and scale pass through
    COMPUTE = "compute"  # ONNX Runtime has an integer kernel for it
    FLOAT = "float"  # runs in float between dequantize and quantize


CONVOLUTIONS = {aten.conv2d.default, aten.conv1d.default}
WEIGHTED = CONVOLUTIONS | {aten.linear.default}

PASSTHROUGH = {
    aten.max_pool2d.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.roll.default,
    aten.constant_pad_nd.default,
    aten.upsample_nearest2d.vec,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
}

_SOFTMAXES = {aten.softmax.int, aten._softmax.default}

COMPUTE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.cat.default,
    aten.avg_pool2d.default,
    aten.sigmoid.default,
    aten.leaky_relu.default,
}

# Their slope is infinite at values that a grid holds: 0, 1 or -1.
_STEEP = {
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.log.default,
    aten.log2.default,
    aten.log10.default,
    aten.log1p.default,
    aten.asin.default,
    aten.acos.default,
    aten.atanh.default,
    aten.acosh.default,
    aten.atan2.default,
}


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The activations a node reads, in order: parameters, constants and sizes are left out."""
    return [n for n in node.all_input_nodes if is_activation(n)]


def is_activation(node: fx.Node) -> bool:
    """Whether a node carries a tensor that depends on the network's input."""
    return node.op in ("placeholder", "call_function") and isinstance(node.meta.get("val"), torch.Tensor)


def activation_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """All activations of a graph in execution order, the network's input first."""
    return (n for n in graph.nodes if is_activation(n))


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of a ReLU-like operator, ``high`` infinite for a plain ReLU; None for others."""
    if node.target == aten.relu.default:
        return 0.0, float("inf")
    if node.target in (aten.hardtanh.default, aten.clamp.default, aten.relu6.default):
        low, high = _clamp_arguments(node)
        if low == 0.0 and high > 0:
            return low, high
    return None


def _clamp_arguments(node: fx.Node) -> tuple[float, float]:
    if node.target == aten.relu6.default:
        return 0.0, 6.0
    default = (-1.0, 1.0) if node.target == aten.hardtanh.default else (None, None)
    given = [*node.args[1:], *default[len(node.args) - 1 :]]
    low, high = node.kwargs.get("min", given[0]), node.kwargs.get("max", given[1])
    as_float = [v if isinstance(v, (int, float)) else None for v in (low, high)]
    return (
        float("-inf") if as_float[0] is None else float(as_float[0]),
        float("inf") if as_float[1] is None else float(as_float[1]),
    )


def role(node: fx.Node) -> Role:
    """The role of one call_function node."""
    target = node.target
    if target in WEIGHTED:
        constant = isinstance(node.args[1], fx.Node) and not is_activation(node.args[1])
        return Role.WEIGHTED if constant else Role.FLOAT
    if clamp_bounds(node) is not None:
        return Role.ACTIVATION
    if target == aten.constant_pad_nd.default:
        return Role.PASSTHROUGH if len(node.args) < 3 or node.args[2] == 0 else Role.FLOAT
    if target in PASSTHROUGH:
        return Role.PASSTHROUGH if len(tensor_inputs(node)) == 1 else Role.FLOAT
    if is_global_pool(node):
        return Role.COMPUTE
    if target in COMPUTE:
        return Role.COMPUTE if _only_activations(node) else Role.FLOAT
    return Role.FLOAT


def is_steep(node: fx.Node) -> bool:
    """Whether an operator's gradient may be infinite where its value is finite, as that of a root is at 0."""
    if node.target is aten.pow.Tensor_Scalar:
        exponent = node.args[1]
        return not isinstance(exponent, (int, float)) or exponent < 1
    return node.target in _STEEP


def is_global_pool(node: fx.Node) -> bool:
    """Whether a node is the canonical global average pool: mean over height and width, dimensions kept."""
    return (
        node.target == aten.mean.dim
        and tuple(node.args[1:]) == ([2, 3], True)
        and node.args[0].meta["val"].dim() == 4
    )


def _only_activations(node: fx.Node) -> bool:
    """Integer kernels take quantized tensors only: a constant, a scalar or a mask keeps the op in float."""
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        operands = node.args[:2]
        return not node.kwargs and all(isinstance(a, fx.Node) and _has_grid(a) for a in operands)
    if node.target == aten.cat.default:
        return all(map(_has_grid, node.all_input_nodes))
    return True


def _has_grid(node: fx.Node) -> bool:
    """Whether a node's values can be codes: masks and indices have no grid.

    A softmax gets none either: between two grids ONNX Runtime would run it from a table of its own, in
    arithmetic that nobody documents.
    """
    made = node
    while made.target in PASSTHROUGH and len(tensor_inputs(made)) == 1:
        made = tensor_inputs(made)[0]
    is_real = is_activation(node) and bool(node.meta["val"].dtype.is_floating_point)
    return is_real and made.target not in _SOFTMAXES
