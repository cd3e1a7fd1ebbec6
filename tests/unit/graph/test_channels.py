"""Which dimension the loss sums over: that of the channels, wherever a network keeps them."""

import pytest
import torch
from networks import SIZE, placed, trained
from torch import nn

from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.channels import channel_axis
from metaaug_cli.graph.ops import is_activation
from metaaug_cli.quantization.blocks import build_chain


class Mixer(nn.Module):
    """Patches of a convolution become tokens, rows of pixels with channels last, and a map again."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, stride=2)
        self.token = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.pixel = nn.Linear(6, 10)
        self.back = nn.Conv2d(10, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + torch.relu(self.token(self.norm(x)))
        x = torch.relu(self.pixel(x.reshape(-1, 4, 4, 6))).permute(0, 3, 1, 2)
        return self.head(torch.relu(self.back(x)).mean((2, 3)))


def test_channels_are_followed_through_every_turn():
    graph = capture(trained(Mixer()), SIZE).graph
    sizes = {(6, 4, 4), (6, 16), (16, 6), (4, 4, 6), (4, 4, 10), (10, 4, 4), (7, 4, 4), (7,), (5,)}
    seen = {}
    for node in graph.nodes:
        if node.op == "call_function" and is_activation(node):
            shape = tuple(node.meta["val"].shape[1:])
            seen.setdefault(shape, set()).add(channel_axis(node))
    assert sizes <= set(seen)
    expected = {(6, 16): 1, (16, 6): 2, (4, 4, 6): 3, (4, 4, 10): 3}
    for shape in sizes:
        assert seen[shape] == {expected.get(shape, 1)}, shape


def test_blocks_know_the_channels_of_what_they_make():
    module = capture(trained(Mixer()), SIZE)
    chain = build_chain(module, placed(module))
    made = [
        (tuple(block.stage.outputs[i].meta["val"].shape[1:]), axis)
        for block in chain.blocks
        for i, axis in zip(block.computed, block.channel_axes, strict=True)
    ]
    assert made
    for shape, axis in made:
        assert shape[axis - 1] in (5, 6, 7, 10), (shape, axis)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), 1), ((2, 3, 4), 2), ((2, 3, 4, 5), 1)])
def test_what_cannot_be_traced_is_as_usual(shape, axis):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.empty(shape)
    assert channel_axis(node) == axis
