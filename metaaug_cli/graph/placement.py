"""Which tensor gets a quantizer, and how many bits.

``academic`` places quantizers as the papers do: on the inputs of every convolution and linear layer
(hence on residual shortcuts that share them), the network's input excepted. ``integer`` keeps those and
adds 8-bit quantizers on every other tensor that an integer kernel reads or writes. ``full`` stands where
``integer`` does, and leaves no layer or tensor at more bits than were asked for (the hardware setting of
Dikstein et al. 2024, arXiv 2410.22110).

Values that only move data (max pools, views, slices, zero padding) share one grid: quantizing commutes
with them, so one quantizer serves the whole class of values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from metaaug_cli.errors import GraphError
from metaaug_cli.graph.ops import Role, activation_nodes, clamp_bounds, is_activation, role, tensor_inputs


@dataclass(frozen=True)
class Bits:
    """Bit-widths of a placement; see ``config.Quantization`` for the meaning of each."""

    weight: int
    act: int
    first_last_weight: int = 8
    first_last_act: int = 8
    other_act: int = 8
    stem_output: int | None = None


@dataclass(frozen=True)
class WeightSpec:
    """How one layer's weight is quantized."""

    name: str
    node: fx.Node
    bits: int
    symmetric: bool
    is_first: bool = False
    is_last: bool = False


@dataclass(frozen=True)
class ActivationSpec:
    """One activation grid: ``root`` computes the values, ``anchor`` is where they are fake-quantized."""

    name: str
    root: fx.Node
    anchor: fx.Node
    members: frozenset[fx.Node]
    bits: int
    symmetric: bool
    feeds_layer: bool
    is_output: bool = False
    high: float = float("inf")


@dataclass(frozen=True)
class Placement:
    """Every quantizer of a network, keyed by the node it stands on."""

    kind: str
    weights: dict[fx.Node, WeightSpec]
    activations: dict[fx.Node, ActivationSpec]
    grid_of: dict[fx.Node, ActivationSpec] = field(default_factory=dict)

    @property
    def first_layer(self) -> WeightSpec:
        """The first convolution or linear layer."""
        return next(w for w in self.weights.values() if w.is_first)


def place(
    graph: fx.Graph,
    *,
    kind: str,
    bits: Bits,
    weight_symmetric: bool | None = None,
    act_symmetric: bool = True,
    quantize_output: bool = True,
) -> Placement:
    """Decide every quantizer of a normal-form graph.

    Args:
        graph: Normal-form graph.
        kind: "academic", "integer" or "full"; ``bits`` says how wide the grids are.
        bits: Bit-widths.
        weight_symmetric: None chooses asymmetric below 8 bits and symmetric at 8, where ``code - zero_point``
            would not fit an int8 container.
        act_symmetric: For the learned low-bit activation grids; the ``other`` grids are always affine.
        quantize_output: Put the logits on a grid too (not in ``academic``).

    Raises:
        GraphError: The network has no convolution or linear layer.
    """
    layers = [n for n in graph.nodes if n.op == "call_function" and role(n) is Role.WEIGHTED]
    real = [n for n in layers if not n.meta.get("affine")]
    if not real:
        raise GraphError("the network has no convolution or linear layer with constant weights to quantize")
    last = _last_layers(graph, set(real))
    affine_bits = bits.weight if kind == "full" else 8
    weights = {n: _weight_spec(n, bits, affine_bits, weight_symmetric, real[0], last) for n in layers}
    context = _Context(graph, kind, bits, weights, act_symmetric, quantize_output)
    activations, grid_of = _activation_specs(context)
    return Placement(kind, _uniquely_named(weights), activations, grid_of)


@dataclass(frozen=True)
class _Context:
    graph: fx.Graph
    kind: str
    bits: Bits
    weights: dict[fx.Node, WeightSpec]
    act_symmetric: bool
    quantize_output: bool


def _weight_spec(
    node: fx.Node,
    bits: Bits,
    affine_bits: int,
    symmetric: bool | None,
    first: fx.Node,
    last: set[fx.Node],
) -> WeightSpec:
    affine, edge = bool(node.meta.get("affine")), node is first or node in last
    width = affine_bits if affine else bits.first_last_weight if edge else bits.weight
    chosen = width == 8 if symmetric is None or width == 8 else symmetric
    name = layer_name(node)
    return WeightSpec(name, node, width, chosen, is_first=node is first, is_last=node in last)


def layer_name(node: fx.Node) -> str:
    """The user's name of a weighted node: the path of the module that holds its weight."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    module, _, parameter = str(weight.target).rpartition(".")
    return module or parameter.removeprefix("folded_")


def _uniquely_named(weights: dict[fx.Node, WeightSpec]) -> dict[fx.Node, WeightSpec]:
    seen: dict[str, int] = {}
    result = {}
    for node, spec in weights.items():
        count = seen[spec.name] = seen.get(spec.name, 0) + 1
        name = spec.name if count == 1 else f"{spec.name}_use{count}"
        result[node] = WeightSpec(name, node, spec.bits, spec.symmetric, spec.is_first, spec.is_last)
    return result


def _last_layers(graph: fx.Graph, layers: set[fx.Node]) -> set[fx.Node]:
    """Layers from which the output is reached without passing another layer."""
    output = next(n for n in graph.nodes if n.op == "output")
    found: set[fx.Node] = set()
    pending, seen = list(output.all_input_nodes), set()
    while pending:
        node = pending.pop()
        if node in seen or not is_activation(node):
            continue
        seen.add(node)
        if node in layers:
            found.add(node)
        else:
            pending.extend(node.all_input_nodes)
    return found


def _activation_specs(
    context: _Context,
) -> tuple[dict[fx.Node, ActivationSpec], dict[fx.Node, ActivationSpec]]:
    members: dict[fx.Node, list[fx.Node]] = {}
    root_of: dict[fx.Node, fx.Node] = {}
    for node in activation_nodes(context.graph):
        passes = node.op == "call_function" and role(node) is Role.PASSTHROUGH
        root = root_of[tensor_inputs(node)[0]] if passes else node
        root_of[node] = root
        members.setdefault(root, []).append(node)
    activations: dict[fx.Node, ActivationSpec] = {}
    grid_of: dict[fx.Node, ActivationSpec] = {}
    names = {spec.name: 1 for spec in context.weights.values()}  # the two kinds share a namespace in the file
    for root, group in members.items():
        spec = _spec_of_class(context, root, group, names)
        if spec is not None:
            activations[spec.anchor] = spec
            grid_of.update(dict.fromkeys(group, spec))
    return activations, grid_of


def _spec_of_class(
    context: _Context, root: fx.Node, group: list[fx.Node], names: dict[str, int]
) -> ActivationSpec | None:
    inside = set(group)
    consumers = [u for n in group for u in n.users if u not in inside]
    layer_bits = [b for b in (_input_bits(context, u, root) for u in consumers) if b is not None]
    is_integer = context.kind != "academic"
    if not layer_bits and not (is_integer and _needs_grid(root, consumers)):
        return None
    is_output = any(u.op == "output" for u in consumers)
    if not layer_bits and is_output and not context.quantize_output:
        return None
    bits = min(layer_bits, default=context.bits.other_act)
    bounds = clamp_bounds(root) if root.op == "call_function" else None
    owner = root.meta.get("owner") or ""
    base = "input" if root.op == "placeholder" else f"{owner}.{root.name}" if owner else root.name
    count = names[base] = names.get(base, 0) + 1
    return ActivationSpec(
        name=base if count == 1 else f"{base}_{count}",
        root=root,
        anchor=_anchor(root, inside),
        members=frozenset(group),
        bits=bits,
        symmetric=context.act_symmetric and bool(layer_bits),
        feeds_layer=bool(layer_bits),
        is_output=is_output,
        high=bounds[1] if bounds else float("inf"),
    )


def _input_bits(context: _Context, consumer: fx.Node, root: fx.Node) -> int | None:
    """Bits that one consumer asks of its input; None where it is no layer whose input the papers quantize."""
    spec = context.weights.get(consumer)
    if spec is None or consumer.meta.get("affine"):
        return None
    if spec.is_first and root.op == "placeholder":
        return None if context.kind == "academic" else context.bits.first_last_act
    if spec.is_last or spec.is_first:
        return context.bits.first_last_act
    if context.bits.stem_output is not None and _computed_by_first_layer(root, context):
        return context.bits.stem_output
    return context.bits.act


def _computed_by_first_layer(root: fx.Node, context: _Context) -> bool:
    node = root
    while node.op == "call_function" and role(node) is Role.ACTIVATION:
        node = tensor_inputs(node)[0]
    spec = context.weights.get(node)
    return spec is not None and spec.is_first


def _needs_grid(root: fx.Node, consumers: list[fx.Node]) -> bool:
    """Whether an integer kernel reads or writes the value, activations fused into their producer excepted."""
    only_reader = next(iter(root.users)) if len(root.users) == 1 else None
    if only_reader is not None and only_reader.op == "call_function" and role(only_reader) is Role.ACTIVATION:
        return False
    producer = root
    while producer.op == "call_function" and role(producer) is Role.ACTIVATION:
        producer = tensor_inputs(producer)[0]
    integer = (Role.WEIGHTED, Role.COMPUTE)
    written = producer.op == "call_function" and role(producer) in integer
    read = any(u.op == "call_function" and role(u) in integer for u in consumers)
    return written or read


def _anchor(root: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The last value of the class that every consumer reads through: the grid is learned where it is used."""
    node = root
    while len(node.users) == 1 and next(iter(node.users)) in inside:
        node = next(iter(node.users))
    return node
