"""Passes that bring a captured ATen graph to normal form.

Normal form: every node gives one tensor; dropout, copies and constant sub-graphs are gone; batch norms
are folded into the layer before them or are depthwise 1x1 convolutions; linears take 2-D input; a
global average pool is one operator and other pools are what integer kernels compute; the batch size
appears only as ``-1`` in views.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from metaaug_cli.graph.graph_tools import add_constant, attribute, insert_call
from metaaug_cli.graph.ops import CONVOLUTIONS
from metaaug_cli.graph.pools import free_sizes, plain_pool
from metaaug_cli.graph.requirements import require_free_batch, require_single_tensors

aten = torch.ops.aten

_IDENTITIES = {
    aten.dropout.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
}
_CONSTANT_FACTORIES = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
_NAMED_PADDING = {
    aten.conv1d.padding: (aten.conv1d.default, 1),
    aten.conv2d.padding: (aten.conv2d.default, 2),
}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
BATCH_NORMS = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}


def normalize(module: fx.GraphModule) -> fx.GraphModule:
    """Apply every pass in order and return the same module, recompiled.

    Raises:
        GraphError: An operator has several outputs, so the graph cannot be cut, or fixes the batch size.
    """
    for one_pass in (
        fold_constants,
        drop_assertions,
        _drop_identities,
        _split_to_slices,
        _plain_pads,
        _convolutions_with_numeric_padding,
        _decompose_silu,
        _pools,
        _batch_free_views,
        _two_dimensional_linears,
        _fold_batch_norms,
    ):
        one_pass(module)
        module.graph.eliminate_dead_code()
    require_free_batch(module)
    require_single_tensors(module)
    _drop_unused_buffers(module)
    module.graph.lint()
    module.recompile()
    return module


def _swap(node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def fold_constants(module: fx.GraphModule) -> None:
    """Evaluate everything that does not depend on the images (attention masks, position tables)."""
    values: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(module, node)
        elif node.op == "call_function":
            shape_only = node.target in _CONSTANT_FACTORIES and _is_static(node.args[1:])
            inputs = node.all_input_nodes
            if shape_only:
                like = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
                probe = torch.empty(0, dtype=like.dtype if like is not None else torch.float32)
                kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
                values[node] = node.target(probe, *node.args[1:], **kwargs)
            elif (inputs and all(i in values for i in inputs)) or (
                not inputs and node.target is not aten.sym_size.int
            ):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **{k: v for k, v in kwargs.items() if k != "device"})
    for node, value in values.items():
        if node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        outside = [u for u in node.users if u not in values]
        if outside:
            owner = node.meta.get("owner", "")
            constant = add_constant(module, node, f"{owner}.constant" if owner else "constant", value)
            constant.meta["val"] = node.meta["val"]
            for user in outside:
                user.replace_input_with(node, constant)


def _is_static(args: Any) -> bool:
    return not any(isinstance(a, fx.Node) for a in pytree.tree_leaves(args))


def _drop_identities(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        same_slice = node.target == aten.slice.Tensor and _same_shape(node)
        same_expand = node.target == aten.expand.default and _same_shape(node)
        cast_to_self = node.target in (aten._to_copy.default, aten.to.dtype) and (
            node.meta["val"].dtype == node.args[0].meta["val"].dtype
        )
        if node.target in _IDENTITIES or same_slice or same_expand or cast_to_self:
            _swap(node, node.args[0])
        elif node.target == aten.cat.default and len(node.args[0]) == 1:
            # A dense block's first layer joins one tensor, whose other readers a second grid keeps in float.
            _swap(node, node.args[0][0])


def drop_assertions(module: fx.GraphModule) -> None:
    """Remove what tracing checks of types, devices and sizes, which holds for the place of tracing only."""
    for node in list(module.graph.nodes):
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            module.graph.erase_node(node)


def _same_shape(node: fx.Node) -> bool:
    return tuple(map(str, node.meta["val"].shape)) == tuple(map(str, node.args[0].meta["val"].shape))


def _split_to_slices(module: fx.GraphModule) -> None:
    """chunk/split/unbind give lists; as slices each piece is a tensor of its own."""
    for node in list(module.graph.nodes):
        if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
            continue
        source, index = node.args
        pieces = source.meta.get("val")
        if source.target in BATCH_NORMS or not isinstance(pieces, (list, tuple)):
            continue
        if source.target == aten.unbind.int:
            dim = source.args[1] if len(source.args) > 1 else 0
            _swap(node, insert_call(node, aten.select.int, (source.args[0], dim, index)))
        elif "split" in str(source.target) or "chunk" in str(source.target):
            dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
            start = sum(int(p.shape[dim]) for p in pieces[:index])
            stop = start + int(pieces[index].shape[dim])
            _swap(node, insert_call(node, aten.slice.Tensor, (source.args[0], dim, start, stop)))


def _plain_pads(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target != aten.pad.default or (len(node.args) > 2 and node.args[2] != "constant"):
            continue
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        if not any(node.args[1]):
            _swap(node, node.args[0])
        else:
            _swap(node, insert_call(node, aten.constant_pad_nd.default, (*node.args[:2], value or 0)))


def _convolutions_with_numeric_padding(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target not in _NAMED_PADDING:
            continue
        plain, rank = _NAMED_PADDING[node.target]
        ones = (1,) * rank
        x, weight, bias, stride, padding, dilation, groups = _fill(node, (None, ones, "valid", ones, 1))
        if padding == "same":
            kernel = weight.meta["val"].shape[2:]
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if all(t % 2 == 0 for t in total):
                pads = [t // 2 for t in total]
            else:
                sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
                x, pads = insert_call(node, aten.constant_pad_nd.default, (x, sides)), [0] * rank
        else:
            pads = [0] * rank
        _swap(node, insert_call(node, plain, (x, weight, bias, stride, pads, dilation, groups)))


def _fill(node: fx.Node, defaults: tuple[Any, ...]) -> list[Any]:
    """Positional arguments with the schema's defaults for those not given."""
    names = [a.name for a in node.target._schema.arguments]
    filled = list(node.args)
    for position in range(len(node.args), len(names)):
        default = defaults[position - 2] if position >= 2 else None
        filled.append(node.kwargs.get(names[position], default))
    return filled


def _decompose_silu(module: fx.GraphModule) -> None:
    """x * sigmoid(x) has integer kernels for both halves, SiLU as one operator has none."""
    for node in list(module.graph.nodes):
        if node.target == aten.silu.default:
            gate = insert_call(node, aten.sigmoid.default, (node.args[0],))
            _swap(node, insert_call(node, aten.mul.Tensor, (node.args[0], gate)))


def _pools(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        pool = plain_pool(node)
        if pool is not None:
            _swap(node, pool)


def _batch_free_views(module: fx.GraphModule) -> None:
    """Views name the batch size as a symbol; ``-1`` says the same without a second live value."""
    for node in module.graph.nodes:
        if node.target in _VIEWS:
            sizes = list(node.args[1])
            symbolic = [i for i, size in enumerate(sizes) if isinstance(size, fx.Node)]
            known = free_sizes(node.meta["val"].shape)
            if len(symbolic) == 1 and known.count(-1) == 1:
                sizes = known
            node.args = (node.args[0], sizes)
            node.target = aten.reshape.default


def _two_dimensional_linears(module: fx.GraphModule) -> None:
    """(…, K) -> (M, K) around linears, since only a 2-D Gemm becomes an integer kernel with an int32 bias."""
    for node in list(module.graph.nodes):
        if node.target != aten.linear.default or node.args[0].meta["val"].dim() == 2:
            continue
        x, shape = node.args[0], node.meta["val"].shape
        flat = insert_call(node, aten.reshape.default, (x, [-1, int(x.meta["val"].shape[-1])]))
        linear = insert_call(node, aten.linear.default, (flat, *node.args[1:]))
        _swap(node, insert_call(node, aten.reshape.default, (linear, free_sizes(shape))))


def _fold_batch_norms(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target not in BATCH_NORMS:
            continue
        x, gamma, beta, mean, variance = node.args[:5]
        mean_value = attribute(module, mean)
        ones, zeros = torch.ones_like(mean_value), torch.zeros_like(mean_value)
        gamma_value = ones if gamma is None else attribute(module, gamma)
        beta_value = zeros if beta is None else attribute(module, beta)
        variance_value = attribute(module, variance).double() + batch_norm_epsilon(node)
        factor = gamma_value.double() / variance_value.sqrt()
        shift = beta_value.double() - mean_value.double() * factor
        producer = x
        result = node if isinstance(node.meta["val"], Tensor) else next(iter(node.users))
        if _can_fold(producer, node):
            _fold_into(module, producer, factor, shift)
            _swap(result, producer)
        else:
            name = str((gamma or mean).target).rpartition(".")[0] or "norm"
            _swap(result, _depthwise(module, node, name, factor, shift))
        if result is not node:
            module.graph.erase_node(node)


def batch_norm_epsilon(node: fx.Node) -> float:
    """What a batch norm adds to the variance before it takes the root."""
    last = node.target == aten._native_batch_norm_legit_no_training.default
    return float(node.args[-1] if last else node.args[7])  # type: ignore[arg-type]


def _can_fold(producer: fx.Node, norm: fx.Node) -> bool:
    is_layer = producer.target in CONVOLUTIONS or producer.target == aten.linear.default
    return is_layer and list(producer.users) == [norm]


def _fold_into(module: fx.GraphModule, layer: fx.Node, factor: Tensor, shift: Tensor) -> None:
    weight_node = layer.args[1]
    bias_node = layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight_node, fx.Node)
    assert bias_node is None or isinstance(bias_node, fx.Node)
    weight = attribute(module, weight_node)
    folded = (weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))).float()
    bias = shift if bias_node is None else attribute(module, bias_node).double() * factor + shift
    path, dot, leaf = str(weight_node.target).rpartition(".")
    new_weight = add_constant(module, layer, f"{path}{dot}folded_{leaf}", folded)
    new_bias = add_constant(module, layer, f"{path}{dot}folded_bias", bias.float())
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])


def _depthwise(module: fx.GraphModule, norm: fx.Node, name: str, factor: Tensor, shift: Tensor) -> fx.Node:
    """A batch norm with no layer to fold into, as the depthwise 1x1 convolution it is.

    What is not (N, C, H, W) is viewed as (N, C, everything else, 1).
    """
    x, channels = norm.args[0], factor.numel()
    assert isinstance(x, fx.Node)
    sizes = free_sizes(x.meta["val"].shape)
    is_image = len(sizes) == 4
    if not is_image:
        rest = -1 if -1 in sizes[2:] else math.prod(sizes[2:])
        x = insert_call(norm, aten.reshape.default, (x, [sizes[0], channels, rest, 1]))
    weight = add_constant(module, norm, f"{name}.folded_weight", factor.float().reshape(channels, 1, 1, 1))
    bias = add_constant(module, norm, f"{name}.folded_bias", shift.float())
    node = insert_call(norm, aten.conv2d.default, (x, weight, bias, [1, 1], [0, 0], [1, 1], channels))
    node.meta["affine"] = True
    return node if is_image else insert_call(norm, aten.reshape.default, (node, sizes))


def _drop_unused_buffers(module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_buffers() if n not in used]:
        owner_path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner_path), leaf)
    module.delete_all_unused_submodules()
