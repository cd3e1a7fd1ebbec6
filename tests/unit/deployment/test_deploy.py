"""The deployed network computes what the learned blocks compute, from integers alone."""

import pytest
import torch
from networks import FAMILIES, SIZE, family, images, placed, targets, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.deployment.deploy import deploy
from metaaug_cli.errors import GraphError
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits
from metaaug_cli.quantization.blocks import build_chain, search_activation_scales

FAKE_QUANTIZE = torch.ops.metaaug.fake_quantize.default
STORED_AS = {
    "codes": torch.int8,
    "bias_codes": torch.int32,
    "scale": torch.float32,
    "bias_scale": torch.float32,
}
SAME = {"first_last_weight": 2, "first_last_act": 2, "other_act": 2}
BITS = {
    "W8A8": Bits(8, 8),
    "W4A4": Bits(4, 4),
    "W2A4": Bits(2, 4),
    "W2A2": Bits(2, 2),
    "W3A5 with 6 elsewhere": Bits(3, 5, first_last_weight=6, first_last_act=6, other_act=6, stem_output=7),
    "W2A2 everywhere": Bits(2, 2, **SAME),
}


def learned(module, kind, bits, cuts=None, **options):
    """A chain with searched scales and then moved roundings and scales, as if it had been learned."""
    chain = build_chain(module, placed(module, kind, bits=bits, **options), **(cuts or {}))
    generator = torch.Generator().manual_seed(0)
    values = (images(16),)
    with torch.no_grad():
        for block in chain.blocks:
            search_activation_scales(block, values)
            for q in block.weights.values():
                q.rounding_logits.add_(torch.randn(q.rounding_logits.shape, generator=generator))
                q.relative_scale.mul_(0.9 + 0.2 * torch.rand(q.relative_scale.shape, generator=generator))
            for q in block.activations.values():
                q.relative_scale.mul_(0.9 + 0.2 * torch.rand((), generator=generator))
            values = block.quantized_block(*values)
    return chain


@torch.no_grad()
def logits_of_blocks(chain, x):
    values = (x,)
    for block in chain.blocks:
        values = block.quantized_block(*values)
    return values[0]


def assert_same_network(chain, deployed, x):
    """Equal up to float32 rounding; a sum on the border of two codes may move a logit by some steps."""
    ours, theirs = logits_of_blocks(chain, x), deployed(x).detach()
    spread = float(ours.max() - ours.min())
    assert spread > 0
    difference = (ours - theirs).abs()
    assert float((difference > 1e-4 * spread).float().mean()) <= 0.05
    assert float(difference.median()) <= 1e-5 * spread


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        *(pytest.param("integer", bits, id=f"integer {name}") for name, bits in BITS.items()),
        *(pytest.param("academic", BITS[name], id=f"academic {name}") for name in ("W8A8", "W4A4", "W2A2")),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_deployed_network_equals_the_chain_of_blocks(name, bits, kind):
    chain = learned(family(name), kind, bits)
    deployed = deploy(chain)
    assert_same_network(chain, deployed, images(24, seed=7))
    error = deployed(images(24)) - family(name)(images(24))
    assert float(error.abs().max()) > 1e-3, "this is the float network"


@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ({"act_symmetric": False}, {}),
        ({"weight_symmetric": True}, {}),
        ({"quantize_output": False}, {}),
        ({}, {"max_layers": 1}),
        ({}, {"granularity": "layer"}),
    ],
)
def test_so_it_does_with_every_other_choice(options, cuts):
    chain = learned(family("dense"), "integer", Bits(4, 4), cuts, **options)
    assert_same_network(chain, deploy(chain), images(24, seed=7))


def quantizer_of(deployed, name):
    quantizers = [n for n in deployed.graph.nodes if n.target is FAKE_QUANTIZE]
    return next(n for n in quantizers if str(n.args[1].target) == f"{name}.scale")


def test_everything_stored_is_an_integer_or_a_scale():
    chain = learned(family("mobile"), "integer", Bits(4, 4))
    for name, value in deploy(chain).named_buffers():
        kind = name.rpartition(".")[2]
        assert value.dtype == STORED_AS[kind], name


@pytest.mark.parametrize("bits", [Bits(2, 2), Bits(4, 4), Bits(7, 7), Bits(8, 8)])
def test_codes_fit_their_bits(bits):
    chain = learned(family("vgg"), "integer", bits)
    deployed = deploy(chain)
    buffers = dict(deployed.named_buffers())
    for spec in chain.placement.weights.values():
        codes = buffers[f"{spec.name}.codes"].int()
        for channel in codes.flatten(1):  # each has its own zero point
            assert int(channel.max() - channel.min()) <= 2**spec.bits - 1
            assert channel.unique().numel() > 1
    for spec in chain.placement.activations.values():
        _, _, zero, least, greatest = quantizer_of(deployed, spec.name).args
        assert (least, greatest) == (0, 2**spec.bits - 1)
        assert 0 <= zero <= greatest


def test_relu_is_absorbed_and_relu6_becomes_the_greatest_code():
    deployed = deploy(learned(family("vgg"), "integer", Bits(4, 4)))
    assert "relu" not in targets(deployed)
    chain = learned(family("mobile"), "integer", Bits(4, 8))
    for spec in chain.placement.activations.values():
        if spec.high == 6.0:
            chain.activations[spec.anchor].base_scale.fill_(6 / 100)  # a grid that reaches beyond 6
            chain.activations[spec.anchor].relative_scale.data.fill_(1.0)
    deployed = deploy(chain)
    assert "hardtanh" not in targets(deployed)
    clipped = [a for a in chain.placement.activations.values() if a.high == 6.0]
    assert len(clipped) == 7
    assert {quantizer_of(deployed, a.name).args[4] for a in clipped} == {100}
    assert_same_network(chain, deployed, 20 * images(16))


def test_a_relu_that_is_not_absorbed_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            y = self.a(x)
            return self.head((F.relu(y) + self.b(y)).mean([2, 3]))

    chain = learned(capture(trained(Shared()), SIZE), "integer", Bits(4, 4))
    deployed = deploy(chain)
    assert targets(deployed).count("relu") == 1
    assert_same_network(chain, deployed, images(16))


def test_a_relu_before_a_signed_grid_stays():
    """An affine grid that was searched with a zero point above 0 does not clip at 0."""
    chain = learned(family("vgg"), "integer", Bits(4, 4), act_symmetric=False)
    spec = next(a for a in chain.placement.activations.values() if "relu" in str(a.root.target))
    chain.activations[spec.anchor].zero_point.fill_(3.0)
    deployed = deploy(chain)
    assert targets(deployed).count("relu") == 1
    assert_same_network(chain, deployed, images(16))


def test_biases_are_codes_on_the_accumulators_grid():
    chain = learned(family("vgg"), "integer", Bits(3, 4))
    deployed = deploy(chain)
    buffers = dict(deployed.named_buffers())
    float_biases = dict(family("vgg").named_buffers())
    for node, spec in chain.placement.weights.items():
        grid = chain.placement.grid_of[node.args[0]]
        step = buffers[f"{grid.name}.scale"].double() * buffers[f"{spec.name}.scale"].double()
        torch.testing.assert_close(buffers[f"{spec.name}.bias_scale"].double(), step, rtol=1e-6, atol=0)
        error = buffers[f"{spec.name}.bias_codes"] * step - float_biases[f"{spec.name}.bias"]
        assert (error.abs() <= step * 0.501).all()


def test_academic_placement_leaves_the_first_input_and_bias_in_float():
    chain = learned(family("vgg"), "academic", Bits(4, 4))
    buffers = dict(deploy(chain).named_buffers())
    assert torch.equal(buffers["features.0.bias"], dict(family("vgg").named_buffers())["features.0.bias"])
    assert "features.3.bias_codes" in buffers
    assert not any(name.startswith("input") for name in buffers)


def test_a_bias_beyond_int32_is_refused_with_the_layers_name():
    chain = learned(family("vgg"), "integer", Bits(4, 4))
    node = next(n for n, w in chain.placement.weights.items() if w.name == "features.3")
    chain.weights[node].base_scale.fill_(1e-12)
    with pytest.raises(GraphError, match=r"features\.3 does not fit int32"):
        deploy(chain)


def test_constants_of_the_graph_travel():
    network = trained(FAMILIES["mixed"]())
    deployed = deploy(learned(capture(network, SIZE), "integer", Bits(8, 8)))
    constants = [t for name, t in deployed.named_buffers() if name.startswith("constants.")]
    assert any(torch.equal(c, network.offset) for c in constants)


def test_deploying_twice_gives_the_same_network():
    chain = learned(family("mixed"), "integer", Bits(2, 2))
    first, second = deploy(chain), deploy(chain)
    assert first.code == second.code
    assert torch.equal(first(images(4)), second(images(4)))
