"""Blocks: the float chain is the network, quantizers stand where placement says, states travel."""

import pytest
import torch
from networks import FAMILIES, SIZE, family, images, placed, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits
from metaaug_cli.quantization.blocks import (
    absorbed_activation,
    build_chain,
    search_activation_scales,
    widen_output_grids,
)
from metaaug_cli.quantization.quantizers import ActivationQuantizer

CUTS = {"blocks": {}, "split": {"max_layers": 2}, "layers": {"granularity": "layer"}}


def quantizer_calls(block):
    """The activation quantizers of a quantized block in execution order, with their call nodes."""
    for node in block.quantized_block.graph.nodes:
        if node.op == "call_module":
            module = block.quantized_block.get_submodule(str(node.target))
            if isinstance(module, ActivationQuantizer):
                yield node, module


def run(blocks, kind, values):
    """The last block's outputs."""
    for block in blocks:
        values = getattr(block, f"{kind}_block")(*values)
    return values


def calibrated(module, x, kind="integer", *, cuts=None, **options):
    """A chain whose activation scales are searched block by block, as the pipeline does."""
    chain = build_chain(module, placed(module, kind, **options), **(cuts or {}))
    values = (x,)
    for block in chain.blocks:
        search_activation_scales(block, values)
        values = tuple(v.detach() for v in block.quantized_block(*values))
    return chain


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_the_chained_float_blocks_are_the_network_exactly(name, cuts):
    module = family(name)
    chain = build_chain(module, placed(module), **cuts)
    assert len(chain.blocks) >= 3
    (result,) = run(chain.blocks, "float", (images(3),))
    assert torch.equal(result, module(images(3)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("kind", ["integer", "academic"])
def test_every_quantizer_belongs_to_one_block_and_acts_once(name, cuts, kind):
    module = family(name)
    chain = build_chain(module, placed(module, kind), **cuts)
    acts = [key for block in chain.blocks for key in block.activations]
    weights = [key for block in chain.blocks for key in block.weights]
    assert sorted(acts) == sorted(a.name for a in chain.placement.activations.values())
    assert sorted(weights) == sorted(w.name for w in chain.placement.weights.values())
    called = [id(q) for block in chain.blocks for _, q in quantizer_calls(block)]
    assert sorted(called) == sorted(id(q) for q in chain.activations.values())
    for block in chain.blocks:
        assert {id(q) for _, q in quantizer_calls(block)} == {id(q) for q in block.activations.values()}


def test_quantized_chain_follows_the_formula_of_a_network_written_by_hand():
    """The whole quantized VGG again in plain torch, from codes, scales and zero points."""
    module = family("vgg")
    chain = calibrated(module, images(16), bits=Bits(weight=3, act=4))
    weights = {w.name: chain.weights[node].state() for node, w in chain.placement.weights.items()}
    acts = {a.anchor.name: chain.activations[node] for node, a in chain.placement.activations.items()}
    by_root = {a.root: (chain.activations[node], a) for node, a in chain.placement.activations.items()}
    order = [by_root[n] for n in module.graph.nodes if n in by_root]
    assert len(order) == len(acts) == 6
    parameters = dict(module.named_buffers())

    def on_grid(x, index):
        quantizer, spec = order[index]
        scale, zero = quantizer.scale.detach(), quantizer.zero_point
        assert spec.bits == quantizer.bits
        return (torch.clamp(torch.round(x / scale) + zero, 0, 2**spec.bits - 1) - zero) * scale, scale

    def layer(name, x, act_scale, function):
        state = weights[name]
        shape = (-1, *[1] * (state["codes"].dim() - 1))
        zero = state["zero_point"].float().view(shape)
        weight = (state["codes"].float() - zero) * state["scale"].view(shape)
        step = act_scale * state["scale"]
        bias = torch.round(parameters[f"{name}.bias"] / step) * step
        return function(x, weight, bias)

    def conv(x, w, b):
        return F.conv2d(x, w, b, padding=1)

    x, scale = on_grid(images(4), 0)
    x, scale = on_grid(F.relu(layer("features.0", x, scale, conv)), 1)
    x, scale = on_grid(F.relu(layer("features.3", F.max_pool2d(x, 2), scale, conv)), 2)
    x, scale = on_grid(F.relu(layer("features.5", x, scale, conv)), 3)
    x, scale = on_grid(F.relu(layer("classifier.0", F.max_pool2d(x, 2).flatten(1), scale, F.linear)), 4)
    expected, step = on_grid(layer("classifier.3", x, scale, F.linear), 5)
    (result,) = run(chain.blocks, "quantized", (images(4),))
    difference = (result - expected).detach().abs()
    # A sum on the border of two codes may go either way.
    assert float(difference.max()) <= 1.001 * float(step)
    assert float((difference > 1e-4).float().mean()) < 0.1
    assert float((expected - module(images(4))).abs().max()) > float(step)  # three bits do change the network


def test_scales_are_searched_on_the_values_that_reach_them():
    module = family("residual")
    chain = build_chain(module, placed(module))
    x = images(16)
    block = chain.blocks[0]
    search_activation_scales(block, (x,))
    expected = ActivationQuantizer(8, symmetric=True)
    expected.search(x)
    assert torch.equal(block.activations["input"].scale, expected.scale)
    untouched = [q for b in chain.blocks[1:] for q in b.activations.values()]
    assert untouched
    assert {float(q.scale.detach()) for q in untouched} == {1.0}


@pytest.mark.parametrize(("bits", "factor"), [(8, 2.0), (4, 1.0)])
def test_only_logits_of_eight_bits_get_headroom(bits, factor):
    module, x = family("residual"), images(16)
    widths = Bits(weight=4, act=4, other_act=bits)
    plain = calibrated(module, x, bits=widths)
    wide = build_chain(module, placed(module, bits=widths))
    widen_output_grids(wide, 2.0)
    values = (x,)
    for block in wide.blocks:
        search_activation_scales(block, values)
        values = tuple(v.detach() for v in block.quantized_block(*values))
    ratios: dict[bool, set[float]] = {True: set(), False: set()}
    for anchor, grid in wide.placement.activations.items():
        ratio = wide.activations[anchor].scale / plain.activations[anchor].scale
        ratios[grid.is_output].add(round(float(ratio.detach()), 4))
    assert ratios == {False: {1.0}, True: {factor}}


def test_at_eight_bits_the_quantized_chain_is_close_to_the_network():
    for name in FAMILIES:
        module = family(name)
        chain = calibrated(module, images(32), bits=Bits(weight=8, act=8))
        expected = module(images(32))
        (result,) = run(chain.blocks, "quantized", (images(32),))
        assert float((result - expected).detach().norm() / expected.norm()) < 0.05, name


def test_state_round_trip_and_only_the_blocks_own():
    module = family("mobile")
    chain, fresh = calibrated(module, images(16)), build_chain(module, placed(module))
    (before,) = run(fresh.blocks, "quantized", (images(3),))
    for block, other in zip(chain.blocks, fresh.blocks, strict=True):
        state = block.state()
        assert {key.split("/")[1] for key in state} == {*block.weights, *block.activations}
        other.load(state)
        for key, value in other.state().items():
            assert torch.equal(value, state[key]), key
    (expected,) = run(chain.blocks, "quantized", (images(3),))
    (result,) = run(fresh.blocks, "quantized", (images(3),))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_outputs_a_block_only_hands_on_are_not_its_own():
    module = family("dense")
    chain = build_chain(module, placed(module), max_layers=2)
    assert [b.computed for b in chain.blocks] == [(0,), (1, 2), (3, 4), (0,), (0,)]
    assert [b.is_edge for b in chain.blocks] == [True, False, False, False, True]


class AlikeNames(nn.Module):
    """Two different layers whose dotted names differ in punctuation only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.body_0 = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x) * self.body_0(x)).mean([2, 3]))


def test_layers_with_alike_names_keep_their_own_weights():
    network = trained(AlikeNames())
    module = capture(network, SIZE)
    chain = build_chain(module, placed(module))
    (result,) = run(chain.blocks, "float", (images(3),))
    torch.testing.assert_close(result, network(images(3)))


def test_which_activations_are_absorbed():
    graph = family("residual").graph
    relus = [n for n in graph.nodes if "relu" in str(n.target)]
    assert len(relus) == 7
    assert all(absorbed_activation(n) for n in relus)
    assert not any(absorbed_activation(n) for n in graph.nodes if n not in relus)

    class Shared(nn.Module):
        def forward(self, x):
            y = x * x
            return F.relu(y) + y

    (relu,) = [n for n in capture(Shared().eval(), SIZE).graph.nodes if "relu" in str(n.target)]
    assert not absorbed_activation(relu)


def test_learned_scales_reach_the_bias_of_the_next_block():
    """A layer's bias lies on the grid of its input, whose quantizer may belong to the block before."""
    module = family("vgg")
    chain = calibrated(module, images(8))
    block = chain.blocks[2]  # its layer reads values that are quantized on the way in
    x = run(chain.blocks[:2], "quantized", (images(8),))
    before = block.quantized_block(*x)[0].detach()
    (act,) = [q for b in chain.blocks for n, q in b.activations.items() if "relu_1" in n]
    with torch.no_grad():
        act.relative_scale.mul_(1.5)
    after = block.quantized_block(*x)[0]
    assert not torch.allclose(before, after)
    after.square().sum().backward()
    assert act.relative_scale.grad is not None
    assert float(act.relative_scale.grad.abs()) > 0


@pytest.mark.parametrize("cut", CUTS)
def test_a_quantizer_that_only_lends_its_scale_is_still_the_same_module(cut):
    """A copy of its tensors would keep the first scale once blocks are moved to another device."""
    chain = build_chain(family("residual"), placed(family("residual"), "integer"), **CUTS[cut])
    lent = 0
    for block in chain.blocks:
        for node in block.quantized_block.graph.find_nodes(op="get_attr"):
            owner, _, tensor = str(node.target).rpartition(".")
            if tensor == "base_scale":
                quantizer = block.quantized_block.get_submodule(owner)
                assert any(quantizer is q for q in (*chain.activations.values(), *chain.weights.values()))
                lent += 1
    assert lent > 0
    for block in chain.blocks:
        block.quantized_block.double()
    values = (images(8).double(),)
    for block in chain.blocks:
        search_activation_scales(block, values)
        values = block.quantized_block(*values)
        for name, tensor in block.quantized_block.named_buffers():
            if name.endswith("base_scale"):
                assert bool((tensor != 1.0).all()), name
