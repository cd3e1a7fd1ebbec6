"""Cutting a network into the chain of blocks that are reconstructed one after another.

A cut stands at an articulation point: a place in the execution order after which one activation alone is
alive. Residual blocks, dense layers and attention come out whole by themselves. Chains of single layers
are then merged where one of the user's modules owns them (an inverted residual without a shortcut), and
segments with too many layers are split into pieces of about as many layers each, between which several
tensors may pass. Nothing here looks at the name or type of a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, takewhile

import torch
from torch import fx

from metaaug_cli.graph.ops import Role, aten, is_activation, role
from metaaug_cli.graph.placement import layer_name

MERGED_LAYERS = 6


@dataclass(frozen=True)
class Stage:
    """One block of the chain: nodes in order, the activations it takes and the activations it gives."""

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def layers(self) -> list[fx.Node]:
        """The convolution and linear nodes of the block."""
        return [n for n in self.nodes if _is_layer(n)]


def cut_stages(graph: fx.Graph, *, granularity: str = "block", max_layers: int = 16) -> list[Stage]:
    """Cut a normal-form graph into stages.

    Args:
        graph: Normal-form graph.
        granularity: "block" as above, or "layer" for one layer a stage (AdaRound).
        max_layers: Segments with more layers are split.
    """
    order = [n for n in graph.nodes if n.op == "call_function" and is_activation(n)]
    liveness = _Liveness(graph, order)
    segments = _segments(order, liveness)
    limit = max_layers
    if granularity == "layer":
        limit = 1
        groups = [[s] for s in segments]
    else:
        groups = _merge_by_module(segments)
    pieces: list[list[fx.Node]] = []
    for group in groups:
        nodes = [n for segment in group for n in segment]
        pieces.extend(_split(nodes, limit, liveness))
    return _named_stages(pieces, liveness)


class _Liveness:
    """For each position of the order, the activations that later nodes still read."""

    def __init__(self, graph: fx.Graph, order: list[fx.Node]) -> None:
        self.position = {n: i for i, n in enumerate(order)}
        self.placeholder = next(n for n in graph.nodes if n.op == "placeholder")
        self.batch = self.placeholder.meta["val"].shape[0]
        end = len(order)
        self.last_use = {
            n: max((self.position.get(u, end) for u in n.users if _reads_values(u)), default=-1)
            for n in [self.placeholder, *order]
        }
        self.order = order

    def alive_after(self, index: int) -> list[fx.Node]:
        """Activations that exist after ``order[index]`` and are read later; index -1 is the image."""
        candidates = [self.placeholder, *self.order[: index + 1]]
        return [n for n in candidates if self.last_use[n] > index and self._is_per_image(n)]

    def can_cut(self, index: int) -> bool:
        """Whether every value alive after ``index`` is a tensor with the batch in front."""
        candidates = [self.placeholder, *self.order[: index + 1]]
        return all(self._is_per_image(n) for n in candidates if self.last_use[n] > index)

    def _is_per_image(self, node: fx.Node) -> bool:
        shape = node.meta["val"].shape
        return len(shape) > 0 and str(shape[0]) == str(self.batch)


def _reads_values(user: fx.Node) -> bool:
    """A batch size read from a tensor can be read from any other, so it keeps nothing alive."""
    return user.target is not aten.sym_size.int


def _segments(order: list[fx.Node], liveness: _Liveness) -> list[list[fx.Node]]:
    """Nodes between neighbouring articulation points; layerless segments join their neighbours."""
    segments: list[list[fx.Node]] = [[]]
    for index, node in enumerate(order):
        segments[-1].append(node)
        if index + 1 < len(order) and liveness.can_cut(index) and len(liveness.alive_after(index)) == 1:
            segments.append([])
    return _glue_layerless(segments)


def _glue_layerless(segments: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Activations and pools go with the layer before them, the head's pool and flatten with the last."""
    with_layers = [i for i, s in enumerate(segments) if any(map(_is_layer, s))]
    last = with_layers[-1] if with_layers else -1
    before_last = with_layers[-2] if len(with_layers) > 1 else -1
    glued: list[list[fx.Node]] = []
    head: list[fx.Node] = []
    for index, segment in enumerate(segments):
        if index in with_layers:
            glued.append([*head, *segment])
            head = []
        elif not glued or (before_last < index < last and (head or _changes_shape(segment))):
            head.extend(segment)
        else:
            glued[-1].extend(segment)
    return glued


def _changes_shape(segment: list[fx.Node]) -> bool:
    return any(
        str(n.meta["val"].shape) != str(a.meta["val"].shape)
        for n in segment
        for a in n.all_input_nodes
        if is_activation(a)
    )


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and role(node) is Role.WEIGHTED and not node.meta.get("affine")


def _count(nodes: Iterable[fx.Node]) -> int:
    return sum(map(_is_layer, nodes))


def _path(segment: list[fx.Node]) -> tuple[str, ...]:
    """The innermost module that owns every layer of a segment, as path components."""
    owners = [layer_name(n).split(".") for n in segment if _is_layer(n)]
    if not owners:
        owners = [str(n.meta.get("owner", "")).split(".") for n in segment]
    return tuple(names[0] for names in takewhile(lambda n: len(set(n)) == 1, zip(*owners, strict=False)))


def _merge_by_module(segments: list[list[fx.Node]]) -> list[list[list[fx.Node]]]:
    """Group neighbouring segments that form one block of the user's own module tree."""
    last = len(segments) - 1
    edges = {0, last}
    indexed = [(i, s, _path(s)) for i, s in enumerate(segments)]
    return [[segments[i] for i in group] for group in _group(indexed, 0, edges)]


def _group(
    units: list[tuple[int, list[fx.Node], tuple[str, ...]]], depth: int, edges: set[int]
) -> list[list[int]]:
    groups: list[list[int]] = []
    for child, run_iterator in groupby(units, key=lambda u: u[2][depth] if len(u[2]) > depth else None):
        run = list(run_iterator)
        if child is None:
            groups.extend([i] for i, _, _ in run)
        elif len(run) == 1 or _is_block(run, depth + 1, edges):
            groups.append([i for i, _, _ in run])
        else:
            groups.extend(_group(run, depth + 1, edges))
    return groups


def _is_block(run: list[tuple[int, list[fx.Node], tuple[str, ...]]], depth: int, edges: set[int]) -> bool:
    """A module is a block unless it holds the first or last layer, is large, or contains several blocks."""
    if any(i in edges for i, _, _ in run) or sum(_count(s) for _, s, _ in run) > MERGED_LAYERS:
        return False
    several = 0
    for _, children in groupby(run, key=lambda u: u[2][depth] if len(u[2]) > depth else None):
        several += sum(_count(s) for _, s, _ in children) > 1
    return several < 2


def _split(nodes: list[fx.Node], limit: int, liveness: _Liveness) -> list[list[fx.Node]]:
    """Split a segment with more than ``limit`` layers into pieces of about equal layer count."""
    total = _count(nodes)
    if total <= limit:
        return [nodes]
    pieces = -(-total // limit)
    bounds = [total * (k + 1) / pieces for k in range(pieces - 1)] + [float("inf")]
    result: list[list[fx.Node]] = [[]]
    done = 0
    for node in nodes:
        at_bound = done >= bounds[len(result) - 1] - 1e-9
        if (
            at_bound
            and _starts_layer(node, nodes, limit)
            and any(map(_is_layer, result[-1]))
            and liveness.can_cut(liveness.position[node] - 1)
        ):
            result.append([])
        result[-1].append(node)
        done += _is_layer(node)
    return result


def _starts_layer(node: fx.Node, nodes: list[fx.Node], limit: int) -> bool:
    """A cut may come before a layer; with a wide limit also where the owning module changes."""
    if limit == 1:
        flattens = node.target == aten.reshape.default and len(node.users) == 1
        return _is_layer(node) or (flattens and _is_layer(next(iter(node.users))))
    before = nodes[nodes.index(node) - 1]
    here, there = str(node.meta.get("owner", "")), str(before.meta.get("owner", ""))
    return here.split(".")[:3] != there.split(".")[:3] or _is_layer(node)


def _named_stages(pieces: list[list[fx.Node]], liveness: _Liveness) -> list[Stage]:
    stages: list[Stage] = []
    names: dict[str, int] = {}
    for piece in pieces:
        first, last = liveness.position[piece[0]], liveness.position[piece[-1]]
        inputs = liveness.alive_after(first - 1)
        outputs = [piece[-1]] if last == len(liveness.order) - 1 else liveness.alive_after(last)
        base = ".".join(_path(piece)) or (
            layer_name(next(n for n in piece if _is_layer(n))) if _count(piece) else "head"
        )
        count = names[base] = names.get(base, 0) + 1
        stages.append(
            Stage(base if count == 1 else f"{base}_{count}", tuple(piece), tuple(inputs), tuple(outputs))
        )
    return stages


def stage_macs(stage: Stage) -> int:
    """Multiply-accumulates of one image through the block's layers."""
    return sum(_macs(n) for n in stage.layers)


def _macs(node: fx.Node) -> int:
    weight = node.args[1].meta["val"]  # type: ignore[union-attr]
    if node.target == aten.linear.default:
        return int(weight.numel()) * _rows_per_image(node.args[0])  # type: ignore[arg-type]
    positions = 1
    for size in node.meta["val"].shape[2:]:
        positions *= int(size)
    return int(weight.numel()) * positions


def _rows_per_image(matrix: fx.Node) -> int:
    """Rows that one image has in a linear layer's input: several where tokens were flattened into it."""
    source = matrix.args[0] if matrix.target == aten.reshape.default else None
    if not isinstance(source, fx.Node) or source.meta["val"].shape[-1] != matrix.meta["val"].shape[-1]:
        return 1
    rows = 1
    for size in source.meta["val"].shape[1:-1]:
        rows *= int(size)
    return rows


def value_bytes(node: fx.Node) -> int:
    """float32 bytes of one image's activation."""
    sizes = [int(s) for s in node.meta["val"].shape[1:] if not isinstance(s, torch.SymInt)]
    total = 4
    for size in sizes:
        total *= size
    return total
