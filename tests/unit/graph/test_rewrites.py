"""Operators in plainer words: the captured network computes what the user's does, decomposed or not."""

import pytest
import torch
from networks import FAMILIES, SIZE, images, targets, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.graph.capture import capture, capture_unfolded
from metaaug_cli.graph.ops import Role, aten, role


class Change(nn.Module):
    """A convolution and what ``function`` makes of it."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def same(network, size=SIZE):
    """The captured network; it agrees with the user's on one image and on several."""
    network = trained(network)
    module = capture(network, size)
    for count in (1, 3):
        x = images(count, size)
        with torch.no_grad():
            torch.testing.assert_close(module(x.clone()), network(x.clone()), rtol=1e-5, atol=1e-5)
    return module


def scaled_slice(x):
    x[:, :2] *= 0.5
    return x


def shifted(x):
    """Channels that come from the row above or below, as video networks shift them in time."""
    result = torch.zeros_like(x)
    result[:, :1, :-1] = x[:, :1, 1:]
    result[:, 1:2, 1:] = x[:, 1:2, :-1]
    result[:, 2:] = x[:, 2:]
    return result


def every_other(x):
    x[..., ::2] = x[..., 1::2]
    return x


def spread_row(x):
    x[:, 1] = torch.linspace(-1, 1, 8) + x.mean((1, 2, 3), keepdim=True)[:, 0]
    return x


def constant_row(x):
    x[:, 1] = torch.linspace(-1, 1, 8)
    return x


def other_type(x):
    x[:, :2] = x[:, 2:3] > 0
    return x


def new_tensor(x):
    result = torch.zeros(x.shape[0], 8, 8, 8)
    result[:, :4] = x
    result[:, 4:] = x.flip(1)
    return result


WRITES = [scaled_slice, shifted, every_other, spread_row, constant_row, other_type, new_tensor]


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_a_slice_is_the_source(write):
    assert "copy" not in targets(same(Change(write)))


@pytest.mark.parametrize("write", [scaled_slice, shifted, spread_row])
def test_gradients_pass_a_write_into_a_slice(write):
    """Learning needs them, and so do images made from the network, which walk the unfolded graph."""
    network = trained(Change(write)).requires_grad_(False)
    wanted, x = images(2).requires_grad_(), images(2).requires_grad_()
    network(wanted).square().sum().backward()
    capture_unfolded(network, SIZE)(x).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-5, atol=1e-5)


def test_a_forward_that_changes_its_image_in_place():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x.sub_(0.5)
            return self.conv(x)

    assert targets(same(Centred())) == ["sub", "conv2d"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.max(1, keepdim=True)[0], ["conv2d", "amax"]),
        (lambda x: x.max(dim=-1).values, ["conv2d", "amax"]),
        (lambda x: torch.min(x, 2).values, ["conv2d", "amin"]),
        (lambda x: x + x.max(1, keepdim=True).indices, ["conv2d", "argmax", "add"]),
        (lambda x: torch.sub(*x.min(1)), ["conv2d", "amin", "argmin", "sub"]),
    ],
)
def test_greatest_and_least_values_are_single_tensors(function, expected):
    assert targets(same(Change(function))) == expected


def test_a_weighted_sum_is_a_product_and_an_integer_sum():
    module = same(Change(lambda x: torch.add(F.relu(x), x, alpha=0.3)))
    assert targets(module) == ["conv2d", "relu", "mul", "add"]
    assert role(next(n for n in module.graph.nodes if n.target == aten.add.Tensor)) is Role.COMPUTE
    assert targets(same(Change(lambda x: torch.add(x, 2, alpha=3)))) == ["conv2d", "add"]


def test_a_random_slope_is_its_mean_outside_training():
    module = same(Change(nn.RReLU(0.1, 0.5)))
    assert targets(module) == ["conv2d", "leaky_relu"]


class Everything(nn.Module):
    """What ``run_decompositions`` takes apart: convolutions of each kind, linears, norms, pools."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, groups=2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.rows = nn.Conv1d(4, 6, 3, padding=1)
        self.up_rows = nn.ConvTranspose1d(6, 6, 2, 2)
        self.layer_norm = nn.LayerNorm(6)
        self.tokens = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = F.silu(self.grouped(F.max_pool2d(x, 3, 1, 1)))
        x = self.group_norm(self.up(x)).flatten(2)
        x = self.up_rows(F.hardswish(self.rows(x))).transpose(1, 2)
        return self.head((x + self.tokens(self.layer_norm(x))).mean(1))


def decomposed(network):
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(network, (images(2),), dynamic_shapes=shapes).run_decompositions()


def layers(module):
    """Parameter and shape of each weight that is quantized, in order."""
    weighted = [n for n in module.graph.nodes if n.op == "call_function" and role(n) is Role.WEIGHTED]
    return [(str(n.args[1].target), tuple(n.args[1].meta["val"].shape)) for n in weighted]


@pytest.mark.parametrize("build", [Everything, *FAMILIES.values()], ids=["everything", *FAMILIES])
def test_a_decomposed_program_has_the_layers_of_its_network(build):
    network = trained(build())
    module = capture(decomposed(network), SIZE)
    for count in (1, 3):
        x = images(count)
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-4)
    assert layers(module) == layers(capture(network, SIZE))
    assert not {"convolution", "addmm", "mm"} & set(targets(module))


def test_products_that_are_no_layers_stay_as_they_are():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.matrix = nn.Parameter(torch.randn(4, 5))

        def forward(self, x):
            rows = self.layer(x.mean((2, 3)))
            return torch.mm(rows, self.matrix) + torch.mm(rows, rows.t()).mean()

    network = trained(Products())
    assert layers(capture(decomposed(network), SIZE)) == [("layer.weight", (4, 3))]
