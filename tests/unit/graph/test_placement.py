"""Placement against tables written out by hand: which tensor is quantized, with how many bits."""

import pytest
import torch
from networks import SIZE, family, labels, placed, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.errors import GraphError
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.ops import aten
from metaaug_cli.graph.placement import Bits

W4A3 = Bits(weight=4, act=3, first_last_weight=8, first_last_act=7, other_act=6)


def weight_bits(placement):
    return {w.name: w.bits for w in placement.weights.values()}


def act_bits(placement):
    """Bits by the operator that computes the values."""
    return {label: a.bits for label, a in grids(placement).items()}


def grids(placement):
    """Grids by the operator that computes their values."""
    specs = placement.activations.values()
    named = labels(next(iter(specs)).root.graph)
    return {named[a.root]: a for a in specs}


def members(spec):
    named = labels(spec.root.graph)
    return {named[n] for n in spec.members}


RESIDUAL_WEIGHTS = {
    "stem.0": 8,
    "layer1.0.first.0": 4,
    "layer1.0.second.0": 4,
    "layer1.1.first.0": 4,
    "layer1.1.second.0": 4,
    "layer1.1.shortcut.0": 4,
    "layer2.0.first.0": 4,
    "layer2.0.second.0": 4,
    "fc": 8,
}
# relu: the stem's; relu_1 is inside the first block, relu_2 ends it, and so on; mean feeds fc
RESIDUAL_ACADEMIC = {"relu": 3, "relu_1": 3, "relu_2": 3, "relu_3": 3, "relu_4": 3, "relu_5": 3, "mean": 7}
RESIDUAL_INTEGER = RESIDUAL_ACADEMIC | {
    "placeholder": 7,  # read by the first layer
    "conv2d_2": 6,  # branches before an addition
    "conv2d_4": 6,
    "conv2d_5": 6,
    "conv2d_7": 6,
    "relu_6": 6,  # read by the pool only
    "linear": 6,
}


@pytest.mark.parametrize(
    ("kind", "expected"), [("academic", RESIDUAL_ACADEMIC), ("integer", RESIDUAL_INTEGER)]
)
def test_residual_network(kind, expected):
    placement = placed(family("residual"), kind, bits=W4A3)
    assert weight_bits(placement) == RESIDUAL_WEIGHTS
    assert act_bits(placement) == expected


def test_mobile_network():
    academic = act_bits(placed(family("mobile"), "academic", bits=W4A3))
    hardtanhs = ["hardtanh", *(f"hardtanh_{i}" for i in range(1, 7))]
    assert academic == dict.fromkeys([*hardtanhs, "conv2d_3", "add"], 3) | {"mean": 7}
    integer = act_bits(placed(family("mobile"), "integer", bits=W4A3))
    assert integer == academic | {"placeholder": 7, "conv2d_6": 6, "conv2d_9": 6, "linear": 6}
    highs = {label: a.high for label, a in grids(placed(family("mobile"), bits=W4A3)).items()}
    assert {highs[name] for name in hardtanhs} == {6.0}
    assert highs["conv2d_3"] == float("inf")


def test_mixed_network():
    integer = act_bits(placed(family("mixed"), "integer", bits=W4A3))
    assert integer == {
        "placeholder": 7,
        "conv2d": 6,  # SiLU reads it twice
        "sigmoid": 6,
        "mul": 3,  # chunked and padded on the way to both convolutions
        "relu": 3,
        "conv2d_2": 6,
        "avg_pool2d": 6,
        "conv2d_3": 6,
        "sigmoid_1": 6,
        "mul_1": 6,
        "cat": 6,  # plus a constant: that addition runs in float
        "add": 6,
        "mean": 7,
        "linear": 6,
    }
    assert act_bits(placed(family("mixed"), "academic", bits=W4A3)) == {"mul": 3, "relu": 3, "mean": 7}


def test_one_quantizer_serves_a_convolution_and_the_shortcut_beside_it():
    for kind in ("academic", "integer"):
        placement = placed(family("residual"), kind)
        shared = grids(placement)["relu_2"]
        readers = {str(u.target).split(".")[1] for u in shared.anchor.users}
        assert readers == {"conv2d"}
        assert len(shared.anchor.users) == 2  # the block's first convolution and its shortcut's


def test_pools_slices_padding_and_views_share_the_grid_of_what_they_move():
    vgg = placed(family("vgg"))
    assert members(grids(vgg)["relu"]) == {"relu", "max_pool2d"}
    assert members(grids(vgg)["relu_2"]) == {"relu_2", "max_pool2d_1", "reshape"}
    assert grids(vgg)["relu"].anchor.target == aten.max_pool2d.default
    for spec in vgg.activations.values():
        assert all(vgg.grid_of[member] is spec for member in spec.members)
    chunked = grids(placed(family("mixed")))["mul"]
    assert chunked.anchor is chunked.root  # two readers take different parts
    assert members(chunked) == {"mul", "slice", "slice_1", "constant_pad_nd"}


class TwoPools(nn.Module):
    """The pooled and the unpooled values of one activation are both read by layers of different bits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        y = F.relu(self.stem(x))
        pooled = F.max_pool2d(y, 2)
        return self.head(pooled.flatten(1)) + self.body(y).mean([2, 3]).sum(1, keepdim=True)


def test_the_least_bits_win_where_readers_differ():
    placement = placed(capture(trained(TwoPools()), SIZE), "academic", bits=W4A3)
    # Body and head both reach the output without another layer in between.
    assert weight_bits(placement) == {"stem": 8, "body": 8, "head": 8}
    assert act_bits(placement) == {"relu": 7}
    assert grids(placement)["relu"].anchor is grids(placement)["relu"].root


def test_relu_is_fused_into_its_producer_and_a_shared_one_is_not():
    placement = placed(family("residual"), "integer")
    assert {"relu", "relu_1"} <= act_bits(placement).keys()
    assert {"conv2d", "conv2d_1"}.isdisjoint(act_bits(placement))

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return self.head((F.relu(y) + self.b(y)).mean([2, 3]))

    roots = act_bits(placed(capture(trained(Shared()), SIZE), "integer", bits=W4A3))
    assert roots == {
        "placeholder": 7,
        "conv2d": 3,
        "relu": 6,
        "conv2d_1": 6,
        "add": 6,
        "mean": 7,
        "linear": 6,
    }


def test_first_and_last_bits_and_same():
    low = Bits(weight=2, act=2, first_last_weight=2, first_last_act=2, other_act=2)
    placement = placed(family("vgg"), "integer", bits=low)
    assert set(weight_bits(placement).values()) == {2}
    assert set(act_bits(placement).values()) == {2}
    firsts = [w.name for w in placement.weights.values() if w.is_first]
    lasts = [w.name for w in placement.weights.values() if w.is_last]
    assert (firsts, lasts) == (["features.0"], ["classifier.3"])
    assert placement.first_layer.name == "features.0"


@pytest.mark.parametrize("kind", ["academic", "integer"])
def test_a_first_layer_that_does_not_read_the_image_itself_has_its_input_quantized(kind):
    network = nn.Sequential(
        nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    bits = act_bits(placed(capture(trained(network), SIZE), kind, bits=W4A3))
    assert {label: bits[label] for label in ("relu", "relu_1", "conv2d_1")} == {
        "relu": 7,
        "relu_1": 3,
        "conv2d_1": 7,
    }
    assert "placeholder" not in bits  # the ReLU's input is no layer's


def test_stem_output_bits_touch_the_first_layers_output_alone():
    bits = Bits(weight=4, act=3, first_last_act=7, other_act=6, stem_output=5)
    for kind, table in (("academic", RESIDUAL_ACADEMIC), ("integer", RESIDUAL_INTEGER)):
        assert act_bits(placed(family("residual"), kind, bits=bits)) == table | {"relu": 5}
    vgg = act_bits(placed(family("vgg"), "academic", bits=bits))
    assert vgg == {"relu": 5, "relu_1": 3, "relu_2": 3, "relu_3": 7}


def test_affine_batch_norms_have_eight_bits_and_are_neither_first_nor_last():
    placement = placed(family("dense"), "integer", bits=Bits(weight=2, act=2))
    norms = {w.name: w for w in placement.weights.values() if "norm" in w.name}
    assert len(norms) == 6
    assert all(w.bits == 8 and w.symmetric and not w.is_first and not w.is_last for w in norms.values())
    others = {w.name: w.bits for w in placement.weights.values() if "norm" not in w.name}
    assert others == {"stem": 8, "fc": 8} | {f"block.{i}.conv": 2 for i in range(6)}
    academic = act_bits(placed(family("dense"), "academic", bits=W4A3))
    assert academic == {"relu": 3} | {f"relu_{i}": 3 for i in range(1, 6)} | {"mean": 7}
    # An affine's own input is no layer input of the papers; integer kernels read it all the same.
    assert "cat_3" not in academic
    assert act_bits(placed(family("dense"), "integer", bits=W4A3))["cat_3"] == 6


@pytest.mark.parametrize(
    ("asked", "bits", "expected"),
    [(None, 4, False), (None, 8, True), (True, 4, True), (False, 4, False), (False, 8, True)],
)
def test_weight_symmetry(asked, bits, expected):
    placement = placed(family("vgg"), bits=Bits(weight=bits, act=4), weight_symmetric=asked)
    inner = {w.symmetric for w in placement.weights.values() if not (w.is_first or w.is_last)}
    assert inner == {expected}
    assert all(w.symmetric for w in placement.weights.values() if w.bits == 8)


def test_activation_symmetry_concerns_layer_inputs_only():
    for asked in (True, False):
        specs = placed(family("residual"), act_symmetric=asked).activations.values()
        assert {a.symmetric for a in specs if a.feeds_layer} == {asked}
        assert {a.symmetric for a in specs if not a.feeds_layer} == {False}


def test_output_may_stay_in_float():
    with_output = act_bits(placed(family("vgg"), quantize_output=True))
    assert with_output.keys() - act_bits(placed(family("vgg"), quantize_output=False)).keys() == {"linear_1"}


def test_names_are_unique_and_a_layer_used_twice_is_numbered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            # The network's input has a grid called "input" as well.
            self.input = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(F.relu(self.input(F.relu(self.input(x)))).mean([2, 3]))

    placement = placed(capture(trained(Twice()), SIZE))
    names = [w.name for w in placement.weights.values()]
    assert names == ["input", "input_use2", "head"]
    names += [a.name for a in placement.activations.values()]
    assert len(set(names)) == len(names)


def test_a_network_without_layers_is_refused():
    with pytest.raises(GraphError, match="no convolution or linear layer"):
        placed(capture(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).eval(), SIZE))


@pytest.mark.parametrize("name", ["residual", "mobile", "vgg", "dense", "mixed"])
def test_every_layer_reads_a_grid_in_integer_placement(name):
    module = family(name)
    placement = placed(module, "integer")
    for node in placement.weights:
        assert node.args[0] in placement.grid_of, node
    # and each grid stands on a node whose values it covers
    for spec in placement.activations.values():
        assert spec.anchor in spec.members
        assert isinstance(spec.root.meta["val"], torch.Tensor)


@pytest.mark.parametrize("name", ["residual", "dense", "mixed"])
def test_full_stands_where_integer_does(name):
    full, integer = (placed(family(name), kind, bits=Bits(3, 4, 3, 4, 4)) for kind in ("full", "integer"))
    assert grids(full).keys() == grids(integer).keys()
    assert set(act_bits(full).values()) == {4}
    assert set(weight_bits(full).values()) == {3}
