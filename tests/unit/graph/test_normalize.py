"""Normal form: what each pass leaves in the graph, and batch-norm folding against eval-mode layers."""

import numpy as np
import pytest
import torch
from networks import SIZE, images, placed, targets, trained
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.graph_tools import lookup
from metaaug_cli.graph.ops import aten


class Body(nn.Module):
    """Any function between the image and a linear layer; modules it uses are registered by name."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def normal_form(function, **modules):
    """(captured network, user's network); both agree on images."""
    network = trained(Body(function, **modules))
    module = capture(network, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(module(images(4)), network(images(4)), rtol=1e-4, atol=1e-5)
    return module, network


def folded_by_hand(layer, norm):
    """Weight and bias of layer + batch norm in numpy, float64."""
    gamma, beta, mean, variance = (
        t.detach().double().numpy() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    factor = gamma / np.sqrt(variance + norm.eps)
    weight = layer.weight.detach().double().numpy()
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), (bias - mean) * factor + beta


FOLDABLE = {
    "convolution": (lambda: nn.Conv2d(3, 5, 3), lambda: nn.BatchNorm2d(5)),
    "convolution without bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), lambda: nn.BatchNorm2d(5, eps=1e-2)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), lambda: nn.BatchNorm2d(6)),
    "same padding": (lambda: nn.Conv2d(3, 4, 3, padding="same"), lambda: nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("parts", FOLDABLE.values(), ids=FOLDABLE.keys())
def test_batch_norm_folds_into_the_layer_before_it(parts):
    module, network = normal_form(
        lambda m, x: m.norm(m.layer(x)).mean([2, 3]), layer=parts[0](), norm=parts[1]()
    )
    assert not any("batch_norm" in name for name in targets(module))
    assert targets(module).count("conv2d") == 1
    weight, bias = folded_by_hand(network.layer, network.norm)
    np.testing.assert_allclose(lookup(module, "layer.folded_weight").numpy(), weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(lookup(module, "layer.folded_bias").numpy(), bias, rtol=1e-6, atol=1e-7)


def test_batch_norm_folds_into_a_linear_layer():
    module, network = normal_form(
        lambda m, x: m.norm(m.layer(x.flatten(1))), layer=nn.Linear(192, 6), norm=nn.BatchNorm1d(6)
    )
    assert targets(module) == ["reshape", "linear"]
    weight, bias = folded_by_hand(network.layer, network.norm)
    np.testing.assert_allclose(lookup(module, "layer.folded_weight").numpy(), weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(lookup(module, "layer.folded_bias").numpy(), bias, rtol=1e-6, atol=1e-7)


class Kernel(nn.Module):
    """A convolution by a tensor of its own, under any name, and a batch norm."""

    def __init__(self, make, norm=None):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(5, 3, 3, 3))
        self.listed = nn.ParameterList([nn.Parameter(torch.ones(5, 3, 3, 3))])
        self.norm = norm or nn.BatchNorm2d(5)
        self.make = make

    def forward(self, x):
        return self.norm(F.conv2d(x, self.make(self), padding=1)).mean([2, 3])


def standardized(m):
    return (m.kernel - m.kernel.mean((1, 2, 3), keepdim=True)) / m.kernel.std((1, 2, 3), keepdim=True)


def pruned():
    layer = nn.Conv2d(3, 5, 3)
    return prune.random_unstructured(layer, "weight", 0.3)


OTHER_WEIGHTS = {
    "parameter": (lambda: Kernel(lambda m: m.kernel), "kernel"),
    "parameter list": (lambda: Kernel(lambda m: m.listed[0]), "listed"),
    "inside": (lambda: nn.Sequential(nn.ReLU(), Kernel(lambda m: m.kernel)), "1"),
    "standardized": (lambda: Kernel(standardized), "constant"),
    "constant": (lambda: Kernel(lambda m: torch.ones(5, 3, 3, 3)), "constant"),
    "pruned": (lambda: nn.Sequential(pruned(), nn.BatchNorm2d(5)), "0"),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 5, 3)), nn.BatchNorm2d(5)),
        None,
    ),
    "linear": (
        lambda: nn.Sequential(
            nn.Flatten(), parametrizations.weight_norm(nn.Linear(192, 5)), nn.BatchNorm1d(5)
        ),
        None,
    ),
}


@pytest.mark.parametrize(("build", "name"), OTHER_WEIGHTS.values(), ids=OTHER_WEIGHTS.keys())
def test_batch_norm_folds_into_weights_of_any_name(build, name):
    network = trained(build())
    module = capture(network, SIZE)
    for count in (1, 4):
        x = images(count)
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)
    assert not any("batch_norm" in target for target in targets(module))
    assert not affine_nodes(module), "a layer of its own"
    (layer,) = placed(module).weights.values()
    assert name is None or layer.name == name


def test_a_batch_norm_of_plain_tensors_before_any_layer():
    network = Body(
        lambda m, x: m.layer(F.relu(F.batch_norm(x, m.mean, m.variance, m.gain))), layer=nn.Conv2d(3, 4, 1)
    )
    network.mean, network.variance = nn.Buffer(torch.tensor([0.1, -0.2, 0.3])), nn.Buffer(torch.ones(3) * 2)
    network.gain = nn.Parameter(torch.tensor([0.5, 2.0, 1.0]))
    module, x = capture(network.eval(), SIZE), images(3)
    torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)
    assert len(affine_nodes(module)) == 1


def affine_nodes(module):
    return [n for n in module.graph.nodes if n.meta.get("affine")]


def test_batch_norm_without_a_layer_before_it_is_a_depthwise_convolution():
    module, network = normal_form(
        lambda m, x: m.layer(F.relu(m.norm(x))).mean([2, 3]), norm=nn.BatchNorm2d(3), layer=nn.Conv2d(3, 4, 1)
    )
    (affine,) = affine_nodes(module)
    assert affine.target == aten.conv2d.default
    gamma = network.norm.weight.detach() / (network.norm.running_var + network.norm.eps).sqrt()
    torch.testing.assert_close(lookup(module, "norm.folded_weight"), gamma.view(3, 1, 1, 1))


HEADS = {
    "rows": lambda m, x: m.layer(m.norm(x.mean([2, 3]))),
    "rows, flattened": lambda m, x: m.wide(m.flat_norm(F.relu(x).flatten(1))),
    "rows, last of all": lambda m, x: m.norm(F.relu(m.layer(x.mean([2, 3])))),
    "sequence": lambda m, x: m.layer(m.norm(x.flatten(2)).mean(2)),
    "sequence, last of all": lambda m, x: m.norm(F.relu(x).flatten(2)).flatten(1),
    "volume": lambda m, x: m.layer(m.volume_norm(x.unsqueeze(2)).mean([2, 3, 4])),
}


@pytest.mark.parametrize("function", HEADS.values(), ids=HEADS.keys())
def test_batch_norm_of_rows_and_sequences_without_a_layer_before_it(function):
    volume_norm = nn.BatchNorm3d(3)
    volume_norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
    volume_norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.2]))
    network = trained(
        Body(
            function,
            norm=nn.BatchNorm1d(3),
            flat_norm=nn.BatchNorm1d(192),
            volume_norm=volume_norm,
            layer=nn.Linear(3, 3),
            wide=nn.Linear(192, 2),
        )
    )
    module = capture(network, SIZE)
    for count in (1, 4):
        x = images(count)
        torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)
    (affine,) = affine_nodes(module)
    assert affine.target == aten.conv2d.default
    assert affine.args[-1] == affine.meta["val"].shape[1], "not depthwise"
    assert not any("batch_norm" in name for name in targets(module))


def test_batch_norm_of_a_shared_result_is_not_folded():
    """The convolution's own output is read as well, so folding would change it."""

    def forward(m, x):
        y = m.layer(x)
        return (y + m.norm(y)).mean([2, 3])

    module, network = normal_form(forward, layer=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    assert len(affine_nodes(module)) == 1
    assert torch.equal(lookup(module, "layer.weight"), network.layer.weight)


def test_one_layer_before_two_batch_norms_is_folded_twice():
    def forward(m, x):
        return (m.first(m.layer(x)) + m.second(m.layer(F.relu(x)))).mean([2, 3])

    module, network = normal_form(
        forward, layer=nn.Conv2d(3, 4, 3), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)
    )
    assert not affine_nodes(module)
    folded = [t for name, t in module.named_buffers() if "folded_weight" in name]
    for norm, weight in zip((network.first, network.second), folded, strict=True):
        np.testing.assert_allclose(weight.numpy(), folded_by_hand(network.layer, norm)[0], rtol=1e-6)


def test_batch_norm_without_affine_parameters():
    module, network = normal_form(
        lambda m, x: m.norm(m.layer(x)).mean([2, 3]),
        layer=nn.Conv2d(3, 4, 3),
        norm=Untouched(nn.BatchNorm2d(4, affine=False)),
    )
    assert targets(module)[0] == "conv2d"
    assert not affine_nodes(module)
    assert not torch.allclose(lookup(module, "layer.folded_weight"), network.layer.weight)


class Untouched(nn.Module):
    """A batch norm with statistics of its own, which ``trained`` cannot set."""

    def __init__(self, norm):
        super().__init__()
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(2.0)
        self.__dict__["inner"] = norm.eval()
        self.register_buffer("mean", norm.running_mean)
        self.register_buffer("variance", norm.running_var)

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, eps=self.inner.eps)


def test_silu_is_a_product_with_a_sigmoid():
    module, _ = normal_form(lambda m, x: F.silu(m.layer(x)).mean([2, 3]), layer=nn.Conv2d(3, 4, 1))
    assert targets(module) == ["conv2d", "sigmoid", "mul", "mean", "reshape"]


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean([2, 3]),
        lambda x: x.mean((-1, -2)),
        lambda x: x.mean([2, 3], keepdim=True).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1),
    ],
)
def test_every_global_average_pool_becomes_one_operator(pool):
    module, _ = normal_form(lambda m, x: m.head(pool(x)), head=nn.Linear(3, 2))
    (mean,) = [n for n in module.graph.nodes if n.target == aten.mean.dim]
    assert tuple(mean.args[1:]) == ([2, 3], True)
    assert mean.meta["val"].shape[1:] == (3, 1, 1)


def test_adaptive_pools_that_divide_become_average_pools():
    module, _ = normal_form(lambda m, x: F.adaptive_avg_pool2d(x, (4, 2)))
    assert targets(module) == ["avg_pool2d"]
    assert next(n.args[1:] for n in module.graph.nodes if n.op == "call_function") == ([2, 4], [2, 4])
    module, _ = normal_form(lambda m, x: F.relu(F.adaptive_avg_pool2d(x, 8)))
    assert targets(module) == ["relu"]


def test_linears_take_two_dimensions():
    module, _ = normal_form(
        lambda m, x: m.head(F.relu(m.layer(x.flatten(2).transpose(1, 2))).mean(1)),
        layer=nn.Linear(3, 4),
        head=nn.Linear(4, 2),
    )
    linears = [n for n in module.graph.nodes if n.target == aten.linear.default]
    assert [n.args[0].meta["val"].dim() for n in linears] == [2, 2]
    assert targets(module).count("linear") == 2


def test_views_do_not_name_the_batch_size():
    module, _ = normal_form(lambda m, x: m.head(x.view(x.shape[0], -1)), head=nn.Linear(192, 2))
    assert targets(module) == ["reshape", "linear"]
    assert "sym_size" not in module.code


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: torch.cat(x.chunk(2, 1), 1), ["slice", "slice", "cat"]),
        (lambda m, x: torch.cat(x.split([1, 2], 1)[::-1], 1), ["slice", "slice", "cat"]),
        (lambda m, x: torch.add(*x.unbind(1)[:2]), ["select", "select", "add"]),
        (lambda m, x: F.relu(F.dropout(x, training=m.training)), ["relu"]),
        (lambda m, x: F.relu(x.clone().contiguous().float()), ["relu"]),
        (lambda m, x: F.relu(F.pad(x, (0, 0, 0, 0))), ["relu"]),
        (lambda m, x: F.relu(F.pad(x, (1, 0, 2, 1))), ["constant_pad_nd", "relu"]),
        (lambda m, x: F.relu(x[:, :, :]), ["relu"]),
        (lambda m, x: torch.cat([F.relu(torch.cat([x], 1)), x], 1), ["relu", "cat"]),
    ],
)
def test_what_is_left_of_movement_and_copies(function, expected):
    assert targets(normal_form(function)[0]) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(3, 4, 3, padding="same"), ["conv2d"]),
        (nn.Conv2d(3, 4, (1, 5), padding="same", dilation=(1, 2)), ["conv2d"]),
        (nn.Conv2d(3, 4, 4, padding="same"), ["constant_pad_nd", "conv2d"]),
        (nn.Conv2d(3, 4, 3, padding="valid", stride=2), ["conv2d"]),
    ],
)
def test_named_padding_becomes_numbers(layer, expected):
    module, _ = normal_form(lambda m, x: m.layer(x), layer=layer)
    assert targets(module) == expected
    conv = next(n for n in module.graph.nodes if n.target == aten.conv2d.default)
    assert all(isinstance(p, int) for p in conv.args[4])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv1d(3, 4, 3, padding="same"), ["conv1d"]),
        (nn.Conv1d(3, 4, 5, padding="same", dilation=2, groups=1, bias=False), ["conv1d"]),
        (nn.Conv1d(3, 4, 4, padding="same"), ["constant_pad_nd", "conv1d"]),
        (nn.Conv1d(3, 4, 3, padding="valid", stride=2), ["conv1d"]),
        (nn.Conv1d(3, 4, 3, padding="valid"), ["conv1d"]),
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_named_padding_becomes_numbers_in_one_dimension(layer, expected, norm):
    network = trained(
        Body(
            lambda m, x: m.norm(m.layer(x.flatten(2))),
            layer=layer,
            norm=nn.BatchNorm1d(4) if norm else nn.Identity(),
        )
    )
    module, x = capture(network, SIZE), images(3)
    torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)
    assert targets(module) == ["reshape", *expected]


def test_constant_arithmetic_is_done_once():
    def forward(m, x):
        return x * (torch.arange(3.0) * m.gain.exp()).view(1, 3, 1, 1)

    network = Body(forward)
    network.gain = nn.Parameter(torch.tensor(0.5))
    module = capture(network.eval(), SIZE)
    assert targets(module) == ["mul"]
    (constant,) = module.buffers()
    torch.testing.assert_close(constant.flatten(), torch.arange(3.0) * float(np.exp(0.5)))


def test_nodes_know_the_module_that_made_them():
    inner = Body(lambda m, x: F.relu(m.layer(x)), layer=nn.Conv2d(3, 4, 1))
    module, _ = normal_form(lambda m, x: m.inner(x).mean([2, 3]), inner=inner)
    owners = {
        str(n.target).split(".")[1]: n.meta["owner"] for n in module.graph.nodes if n.op == "call_function"
    }
    assert owners["conv2d"] == "inner.layer"
    assert owners["relu"] == "inner"
    assert owners["mean"] == ""
