"""Each stage as a pair of callable blocks: full precision, and quantized with its quantizers inside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from metaaug_cli.graph.channels import channel_axis
from metaaug_cli.graph.graph_tools import attribute, register_buffer
from metaaug_cli.graph.ops import Role, aten, is_activation, is_steep, role
from metaaug_cli.graph.placement import Placement
from metaaug_cli.graph.stages import Stage, cut_stages
from metaaug_cli.quantization.functional import finite_gradient, quantize_bias
from metaaug_cli.quantization.quantizers import ActivationQuantizer, WeightQuantizer, learned_scale

_SPARE_BITS = 8


@dataclass(frozen=True)
class Block:
    """One block of the chain.

    ``float_block`` and ``quantized_block`` take the stage's input tensors (N, …) and return a tuple with its
    outputs. ``weights`` and ``activations`` are the quantizers this block owns, by name. ``computed`` are the
    outputs that it makes itself, and ``channel_axes`` the dimension of the channels in each of those.
    """

    index: int
    name: str
    stage: Stage
    float_block: fx.GraphModule
    quantized_block: fx.GraphModule
    weights: dict[str, WeightQuantizer]
    activations: dict[str, ActivationQuantizer]
    computed: tuple[int, ...]
    channel_axes: tuple[int, ...]
    is_edge: bool = False

    def state(self) -> dict[str, Tensor]:
        """Everything learned in this block, flat: ``weights/NAME/codes``, ``activations/NAME/scale``, …"""
        quantizers = {f"weights/{n}": q.state() for n, q in self.weights.items()}
        quantizers |= {f"activations/{n}": q.state() for n, q in self.activations.items()}
        return {f"{name}/{key}": value for name, state in quantizers.items() for key, value in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved ``state()``."""
        for kind, quantizers in (("weights", self.weights), ("activations", self.activations)):
            for name, quantizer in quantizers.items():
                prefix = f"{kind}/{name}/"
                quantizer.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


@dataclass
class Chain:
    """The whole network as blocks in order, with every quantizer by the node it stands on."""

    module: fx.GraphModule
    placement: Placement
    blocks: list[Block]
    weights: dict[fx.Node, WeightQuantizer] = field(default_factory=dict)
    activations: dict[fx.Node, ActivationQuantizer] = field(default_factory=dict)

    def to(self, device: torch.device) -> Chain:
        """Move every block to ``device``."""
        for block in self.blocks:
            block.float_block.to(device)
            block.quantized_block.to(device)
        return self


def build_chain(
    module: fx.GraphModule,
    placement: Placement,
    *,
    granularity: str = "block",
    max_layers: int = 16,
    scale_norm: float = 2.4,
    power_of_two: bool = False,
) -> Chain:
    """Cut a normal-form network and give every block its quantizers, weight scales searched.

    Args:
        module: Normal-form network.
        placement: From ``placement.place`` on its graph.
        granularity: "block" or "layer".
        max_layers: See ``stages.cut_stages``.
        scale_norm: Exponent of the scale search.
        power_of_two: Restrict every scale to powers of two.
    """
    stages = cut_stages(module.graph, granularity=granularity, max_layers=max_layers)
    chain = Chain(module, placement, [])
    for node, spec in placement.weights.items():
        weight_node = node.args[1]
        assert isinstance(weight_node, fx.Node)
        weight = attribute(module, weight_node)
        chain.weights[node] = WeightQuantizer(
            weight, spec.bits, symmetric=spec.symmetric, norm=scale_norm, power_of_two=power_of_two
        )
    for anchor, grid in placement.activations.items():
        chain.activations[anchor] = ActivationQuantizer(
            grid.bits,
            symmetric=grid.symmetric,
            norm=scale_norm,
            clip=not grid.is_output,
            power_of_two=power_of_two,
        )
    applied: set[fx.Node] = set()
    for index, stage in enumerate(stages):
        chain.blocks.append(_build_block(chain, stage, index, applied))
    return chain


def _build_block(chain: Chain, stage: Stage, index: int, applied: set[fx.Node]) -> Block:
    before = set(applied)
    float_block = _Builder(chain, stage, quantized=False, applied=set()).build()
    quantized_block = _Builder(chain, stage, quantized=True, applied=applied).build()
    specs = chain.placement
    weights = {specs.weights[n].name: chain.weights[n] for n in stage.nodes if n in chain.weights}
    owned = [a for a in specs.activations if a in applied - before]
    activations = {specs.activations[a].name: chain.activations[a] for a in owned}
    edge = any(
        specs.weights[n].is_first or specs.weights[n].is_last for n in stage.nodes if n in specs.weights
    )
    computed = tuple(i for i, out in enumerate(stage.outputs) if out in stage.nodes)
    return Block(
        index,
        stage.name,
        stage,
        float_block,
        quantized_block,
        weights,
        activations,
        computed,
        tuple(channel_axis(stage.outputs[i]) for i in computed),
        edge,
    )


class _Builder:
    """Copies one stage's nodes into a graph of its own, with or without quantizers."""

    def __init__(self, chain: Chain, stage: Stage, *, quantized: bool, applied: set[fx.Node]) -> None:
        self.chain, self.stage, self.quantized, self.applied = chain, stage, quantized, applied
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.names: dict[nn.Module, str] = {}

    def build(self) -> fx.GraphModule:
        for number, value in enumerate(self.stage.inputs):
            self.values[value] = self.graph.placeholder(f"input_{number}")
        for value in self.stage.inputs:
            if any(u in self.stage.nodes for u in value.users):
                self._quantize(value)
        for node in self.stage.nodes:
            self.values[node] = self._copy(node)
            is_output = any(u.op == "output" for u in node.users)
            if is_output or any(u in self.stage.nodes for u in node.users):
                self._quantize(node)
        self.graph.output(tuple(self.values[v] for v in self.stage.outputs))
        module = fx.GraphModule(self.root, self.graph)
        for quantizer, name in self.names.items():
            # Where only attributes of a quantizer are read, fx copies those, and a move to a GPU parts them.
            module.add_submodule(name, quantizer)
        return module

    def _quantize(self, value: fx.Node) -> None:
        """Put the value's quantizer after it, in the first block that reads it."""
        if not self.quantized or value in self.applied or value not in self.chain.activations:
            return
        self.applied.add(value)
        name = self._module(self.chain.activations[value], "act")
        self.values[value] = self.graph.call_module(name, (self.values[value],))

    def _copy(self, node: fx.Node) -> fx.Node:
        if self.quantized and node in self.chain.weights:
            return self._quantized_layer(node)
        return self.graph.node_copy(node, self._guarded if is_steep(node) else self._operand)

    def _guarded(self, node: fx.Node) -> fx.Node:
        """The operand of a root or the like, whose slope is infinite where a code is 0."""
        operand = self._operand(node)
        return self.graph.call_function(finite_gradient, (operand,)) if is_activation(node) else operand

    def _quantized_layer(self, node: fx.Node) -> fx.Node:
        x, _, *rest = node.args
        assert isinstance(x, fx.Node)
        quantizer = self.chain.weights[node]
        name = self._module(quantizer, "weight")
        weight = self.graph.call_module(name, ())
        grid = self.chain.placement.grid_of.get(x)
        if rest and isinstance(rest[0], fx.Node) and grid is not None:
            act = self._module(self.chain.activations[grid.anchor], "act")
            parts = [f"{m}.{part}" for m in (act, name) for part in ("base_scale", "relative_scale")]
            scales = tuple(self.graph.get_attr(part) for part in parts)
            rest[0] = self.graph.call_function(
                _biased_on_grid, (self._operand(rest[0]), *scales, quantizer.power_of_two)
            )
        else:
            rest = [self._operand(r) if isinstance(r, fx.Node) else r for r in rest]
        return self.graph.call_function(node.target, (self._operand(x), weight, *rest), node.kwargs)  # type: ignore[arg-type]

    def _operand(self, node: fx.Node) -> fx.Node:
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            name = f"constants.{node.target}"
            register_buffer(self.root, name, attribute(self.chain.module, node))
            return self.graph.get_attr(name)
        if node.target is aten.sym_size.int:
            first = self.values[self.stage.inputs[0]]
            return self.graph.call_function(aten.sym_size.int, (first, 0))
        return self.graph.node_copy(node, self._operand)

    def _module(self, module: nn.Module, kind: str) -> str:
        if module not in self.names:
            self.names[module] = f"{kind}_{len(self.names)}"
            self.root.add_module(self.names[module], module)
        return self.names[module]


def _biased_on_grid(
    bias: Tensor, act_base: Tensor, act: Tensor, weight_base: Tensor, weight: Tensor, power_of_two: bool
) -> Tensor:
    scales = ((act_base, act), (weight_base, weight))
    return quantize_bias(bias, *(learned_scale(*pair, power_of_two=power_of_two) for pair in scales))


class ScaleSearch(fx.Interpreter):
    """Runs a quantized block once and sets each activation scale from the values that reach it."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module.get_submodule(target)
        if isinstance(module, ActivationQuantizer):
            module.search(args[0])
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def search_activation_scales(block: Block, inputs: tuple[Tensor, ...]) -> None:
    """Set every activation scale of the block, in execution order, on one batch of inputs (N, …)."""
    if block.activations:
        ScaleSearch(block.quantized_block).run(*inputs)


def widen_output_grids(chain: Chain, headroom: float) -> None:
    """Give the logits room for greater values than the images at hand cause; 8 bits can spare the steps."""
    for quantizer in chain.activations.values():
        if not quantizer.clip and quantizer.bits == _SPARE_BITS:
            quantizer.headroom = headroom


def absorbed_activation(node: fx.Node) -> bool:
    """Whether a ReLU-like node is its producer's only reader, so that a quantizer after it absorbs it."""
    if node.op != "call_function" or role(node) is not Role.ACTIVATION:
        return False
    producer = node.all_input_nodes[0]
    return is_activation(producer) and len(producer.users) == 1
