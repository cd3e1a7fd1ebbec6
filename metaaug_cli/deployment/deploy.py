"""The deployed network: integer codes and scales, one graph that eager PyTorch and ONNX both run."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import metaaug_cli.deployment.qdq_ops  # noqa: F401 - registers the torch.ops.metaaug operators that the graph calls
from metaaug_cli.errors import GraphError
from metaaug_cli.graph.graph_tools import attribute, register_buffer
from metaaug_cli.graph.ops import is_global_pool
from metaaug_cli.graph.placement import ActivationSpec
from metaaug_cli.quantization.blocks import Chain, absorbed_activation

_LARGEST_BIAS_CODE = 2**31 - 1


def deploy(chain: Chain) -> fx.GraphModule:
    """Build the deployed network from learned quantizers: what ``evaluate`` measures and ``export`` writes.

    Weights are int8 codes with the zero point absorbed, biases int32 codes on the grid of the accumulator,
    activations pass ``metaaug::fake_quantize``. ReLU and ReLU6 before an unsigned grid are absorbed by it.
    In academic placement the input has no grid, so the first layer's bias stays float.

    Raises:
        GraphError: A bias does not fit int32 on its grid.
    """
    return _Deployer(chain).build()


class _Deployer:
    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.grids = chain.placement.grid_of
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        for node in self.chain.module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._on_grid(node, self.graph.placeholder("input"))
            elif node.op == "get_attr":
                continue
            elif node.op == "output":
                self.graph.output(self._operand(node.args[0]))
            else:
                self.values[node] = self._on_grid(node, self._compute(node))
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module.cpu().eval()

    def _compute(self, node: fx.Node) -> fx.Node:
        if node in self.chain.weights:
            return self._layer(node)
        if self._absorbed(node):
            return self._operand(node.all_input_nodes[0])
        if is_global_pool(node):
            pooled = self._operand(node.all_input_nodes[0])
            return self.graph.call_function(torch.ops.metaaug.global_average_pool.default, (pooled,))
        return self.graph.node_copy(node, self._operand)

    def _absorbed(self, node: fx.Node) -> bool:
        grid = self.grids.get(node)
        return grid is not None and absorbed_activation(node) and self._zero_point(grid) == 0

    def _zero_point(self, grid: ActivationSpec) -> int:
        return int(self.chain.activations[grid.anchor].zero_point)

    def _on_grid(self, node: fx.Node, value: fx.Node) -> fx.Node:
        grid = self.grids.get(node)
        if grid is None or node is not grid.root:
            return value  # the other members of the class only move codes
        quantizer = self.chain.activations[grid.anchor]
        scale = quantizer.scale.detach().float()
        greatest = 2**quantizer.bits - 1
        if grid.high != float("inf"):
            greatest = min(greatest, round(grid.high / float(scale)) + self._zero_point(grid))
        buffer = self._buffer(f"{grid.name}.scale", scale)
        return self.graph.call_function(
            torch.ops.metaaug.fake_quantize.default, (value, buffer, self._zero_point(grid), 0, greatest)
        )

    def _layer(self, node: fx.Node) -> fx.Node:
        x, _, *rest = node.args
        assert isinstance(x, fx.Node)
        name = self.chain.placement.weights[node].name
        state = self.chain.weights[node].state()
        codes = state["codes"].to(torch.int16)
        codes -= state["zero_point"].to(torch.int16).view(-1, *[1] * (codes.dim() - 1))
        scale = state["scale"]
        weight = self.graph.call_function(
            torch.ops.metaaug.dequantize_weight.default,
            (self._buffer(f"{name}.codes", codes.to(torch.int8)), self._buffer(f"{name}.scale", scale)),
        )
        grid = self.grids.get(x)
        if rest and isinstance(rest[0], fx.Node):
            bias = attribute(self.chain.module, rest[0])
            rest[0] = (
                self._buffer(f"{name}.bias", bias) if grid is None else self._bias(name, bias, scale, grid)
            )
        return self.graph.call_function(node.target, (self._operand(x), weight, *rest), node.kwargs)  # type: ignore[arg-type]

    def _bias(self, name: str, bias: Tensor, weight_scale: Tensor, grid: ActivationSpec) -> fx.Node:
        act_scale = self.chain.activations[grid.anchor].scale.detach().cpu().float()
        scale = act_scale * weight_scale
        codes = torch.round(bias.cpu() / scale)
        if bool((codes.abs() > _LARGEST_BIAS_CODE).any()):
            raise GraphError(
                f"a bias of layer {name} does not fit int32: "
                f"{float(codes.abs().max()):.3g} steps of its grid",
                hint="the layer has channels with almost no weight; prune them, or raise its weight scale",
            )
        return self.graph.call_function(
            torch.ops.metaaug.dequantize_bias.default,
            (
                self._buffer(f"{name}.bias_codes", codes.to(torch.int32)),
                self._buffer(f"{name}.bias_scale", scale),
            ),
        )

    def _operand(self, node: fx.Node) -> fx.Node:
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            name = f"constants.{node.target}"
            return self._buffer(name, attribute(self.chain.module, node))
        raise AssertionError(f"{node} is read before it is computed")

    def _buffer(self, name: str, value: Tensor) -> fx.Node:
        register_buffer(self.root, name, value.detach().cpu())
        return self.graph.get_attr(name)
