"""Small edits of a graph module: dotted buffers, constants and inserted calls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from metaaug_cli.graph.ops import Role, role


def lookup(module: nn.Module, dotted: str) -> Tensor:
    """The tensor under a dotted name of a module."""
    value: Any = module
    for part in dotted.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def register_buffer(root: nn.Module, dotted: str, value: Tensor) -> str:
    """Put a tensor on ``root`` as a buffer under its dotted name, making plain modules on the way."""
    *path, leaf = dotted.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if not hasattr(owner, leaf):
        owner.register_buffer(leaf, value)
    return dotted


def insert_call(
    node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], *, owner: str | None = None
) -> fx.Node:
    """Insert ``target(*args)`` before ``node``, with its fake value computed, and return the new node."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta["owner"] = node.meta["owner"] if owner is None else owner
    new.meta["stack_trace"] = node.meta.get("stack_trace")
    fake_args = fx.node.map_arg(args, lambda n: n.meta["val"])
    new.meta["val"] = _fake_result(target, fake_args)
    return new


def _fake_result(target: Callable[..., Any], args: Any) -> Any:
    """The fake value of a call; torch's own rule for padding would fix the free batch size."""
    if target is not torch.ops.aten.constant_pad_nd.default:
        return target(*args)
    x, pads = args[:2]
    sizes = list(x.shape)
    for axis, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
        sizes[-axis] += before + after
    return x.new_empty(sizes)


def option(node: fx.Node, name: str) -> Any:
    """An operator's argument by name, or its default; None where the operator has no such argument."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            given = node.args[position : position + 1] or (node.kwargs.get(name, argument.default_value),)
            return given[0]
    return None


def attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor a get_attr node stands for."""
    return lookup(module, str(node.target))


def add_constant(module: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Register ``value`` as a buffer under a free dotted ``name`` and return its get_attr node."""
    unique, count = name, 1
    while _is_taken(module, unique):
        unique, count = f"{name}_{count}", count + 1
    register_buffer(module, unique, value.detach().clone())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(unique)
    node.meta["owner"] = before.meta.get("owner", "")
    mode = _fake_mode(module)
    node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True) if mode else value
    return node


def _is_taken(module: nn.Module, dotted: str) -> bool:
    owner: Any = module
    for part in dotted.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def _fake_mode(module: fx.GraphModule) -> Any:
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


def hash_graph(module: fx.GraphModule) -> str:
    """Hash of a network's operators and constants; the weights of its layers have a hash of their own."""
    digest = hashlib.sha256(str(module.code).encode())
    for node in module.graph.nodes:
        if node.op == "get_attr" and any(role(user) is not Role.WEIGHTED for user in node.users):
            digest.update(attribute(module, node).contiguous().numpy().tobytes())
    return digest.hexdigest()
