"""What each operator means for quantization, by graphs written out by hand."""

import pytest
import torch
from networks import family
from torch import fx

from metaaug_cli.graph.ops import (
    Role,
    activation_nodes,
    aten,
    clamp_bounds,
    is_global_pool,
    is_steep,
    role,
    tensor_inputs,
)


class Graph:
    """Builds a graph node by node, with fake values of the right shapes."""

    def __init__(self):
        self.graph = fx.Graph()
        self.x = self.value(self.graph.placeholder("x"), torch.zeros(2, 4, 6, 6))
        self.y = self.value(self.graph.placeholder("y"), torch.zeros(2, 4, 6, 6))
        self.weight = self.value(self.graph.get_attr("weight"), torch.zeros(4, 4, 3, 3))
        self.constant = self.value(self.graph.get_attr("constant"), torch.zeros(1, 4, 1, 1))

    @staticmethod
    def value(node, value):
        node.meta["val"] = value
        return node

    def call(self, target, *args, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        plain = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        return self.value(node, target(*plain[0], **plain[1]))


@pytest.fixture
def g():
    return Graph()


def test_layers_need_constant_weights(g):
    assert role(g.call(aten.conv2d.default, g.x, g.weight)) is Role.WEIGHTED
    assert role(g.call(aten.conv2d.default, g.x, g.y)) is Role.FLOAT
    rows = g.call(aten.reshape.default, g.x, [-1, 6])
    matrix = g.value(g.graph.get_attr("matrix"), torch.zeros(3, 6))
    assert role(g.call(aten.linear.default, rows, matrix)) is Role.WEIGHTED


@pytest.mark.parametrize(
    ("target", "arguments", "keywords", "expected"),
    [
        (aten.relu.default, (), {}, (0.0, float("inf"))),
        (aten.relu6.default, (), {}, (0.0, 6.0)),
        (aten.hardtanh.default, (0.0, 6.0), {}, (0.0, 6.0)),
        (aten.hardtanh.default, (), {}, None),  # -1 … 1 is no ReLU
        (aten.hardtanh.default, (-1.0, 6.0), {}, None),
        (aten.clamp.default, (0,), {}, (0.0, float("inf"))),
        (aten.clamp.default, (0.0, 2.5), {}, (0.0, 2.5)),
        (aten.clamp.default, (), {"min": 0.0, "max": 3.0}, (0.0, 3.0)),
        (aten.clamp.default, (), {"max": 3.0}, None),
        (aten.clamp.default, (1.0, 3.0), {}, None),
        (aten.leaky_relu.default, (), {}, None),
    ],
)
def test_bounds_of_relu_like_operators(g, target, arguments, keywords, expected):
    node = g.call(target, g.x, *arguments, **keywords)
    assert clamp_bounds(node) == expected
    assert (role(node) is Role.ACTIVATION) == (expected is not None)
    if expected is not None:
        spread = torch.linspace(-9, 9, 50)
        torch.testing.assert_close(target(spread, *arguments, **keywords), spread.clamp(*expected))


def test_movement_passes_codes_through(g):
    assert role(g.call(aten.max_pool2d.default, g.x, [2, 2])) is Role.PASSTHROUGH
    assert role(g.call(aten.slice.Tensor, g.x, 1, 0, 2)) is Role.PASSTHROUGH
    assert role(g.call(aten.permute.default, g.x, [0, 2, 3, 1])) is Role.PASSTHROUGH
    assert role(g.call(aten.expand.default, g.constant, [2, 4, 1, 1])) is Role.FLOAT  # of a constant


def test_only_zero_padding_keeps_codes(g):
    assert role(g.call(aten.constant_pad_nd.default, g.x, [1, 1])) is Role.PASSTHROUGH
    assert role(g.call(aten.constant_pad_nd.default, g.x, [1, 1], 0.0)) is Role.PASSTHROUGH
    assert role(g.call(aten.constant_pad_nd.default, g.x, [1, 1], 1.0)) is Role.FLOAT


def test_integer_kernels_take_activations_only(g):
    assert role(g.call(aten.add.Tensor, g.x, g.y)) is Role.COMPUTE
    assert role(g.call(aten.add.Tensor, g.x, g.constant)) is Role.FLOAT
    assert role(g.call(aten.add.Tensor, g.x, g.y, alpha=2)) is Role.FLOAT
    assert role(g.call(aten.mul.Tensor, g.x, 2.0)) is Role.FLOAT
    assert role(g.call(aten.mul.Tensor, g.x, g.y)) is Role.COMPUTE
    assert role(g.call(aten.cat.default, [g.x, g.y], 1)) is Role.COMPUTE
    table = g.value(g.graph.get_attr("table"), torch.zeros(2, 4, 6, 6))
    assert role(g.call(aten.cat.default, [g.x, table], 1)) is Role.FLOAT
    assert role(g.call(aten.avg_pool2d.default, g.x, [2, 2])) is Role.COMPUTE
    assert role(g.call(aten.gelu.default, g.x)) is Role.FLOAT


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        (aten.sqrt.default, (), True),
        (aten.pow.Tensor_Scalar, (0.5,), True),
        (aten.pow.Tensor_Scalar, (-1,), True),
        (aten.pow.Tensor_Scalar, (2,), False),
        (aten.pow.Tensor_Scalar, (1.5,), False),
        (aten.exp.default, (), False),
        (aten.relu.default, (), False),
    ],
)
def test_roots_and_the_like_have_infinite_slopes(g, target, arguments, expected):
    node = g.call(target, g.x, *arguments)
    assert is_steep(node) is expected
    x = torch.zeros(3, requires_grad=True)
    target(x, *arguments).sum().backward()
    assert bool(x.grad.isfinite().all()) is not expected


def test_only_the_canonical_mean_is_a_global_pool(g):
    pool = g.call(aten.mean.dim, g.x, [2, 3], True)
    assert is_global_pool(pool)
    assert role(pool) is Role.COMPUTE
    for dims, keep in (([2, 3], False), ([1], True), ([2], True)):
        other = g.call(aten.mean.dim, g.x, dims, keep)
        assert not is_global_pool(other)
        assert role(other) is Role.FLOAT


def test_parameters_are_not_activations(g):
    conv = g.call(aten.conv2d.default, g.x, g.weight)
    assert tensor_inputs(conv) == [g.x]
    assert list(activation_nodes(g.graph)) == [g.x, g.y, conv]


def test_every_role_occurs_in_a_real_network():
    nodes = [n for n in family("mixed").graph.nodes if n.op == "call_function"]
    assert {role(n) for n in nodes} == set(Role)
