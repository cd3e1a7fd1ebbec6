"""Passes through the chain: the float network's own features and logits, prefixes that gradients follow."""

import pytest
import torch
from networks import FAMILIES, SIZE, family, images, searched, trained
from torch import nn

from metaaug_cli.augmentation.passes import Passes
from metaaug_cli.graph.capture import capture
from metaaug_cli.layout import fast_layout

CPU = torch.device("cpu")


def by_hook(network, layer, x):
    """Input of a layer (flattened) and output of the network, from the user's module."""
    seen = []
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        logits = network(x)
    handle.remove()
    return seen[0].flatten(1), logits


@pytest.mark.parametrize(
    ("name", "layer"), [("residual", "fc"), ("mobile", "classifier.1"), ("vgg", "classifier.3")]
)
def test_features_and_logits_are_those_of_the_users_network(name, layer):
    network = trained(FAMILIES[name]())
    views = Passes(searched(family(name)).blocks).views(images(70), CPU)
    features, logits = by_hook(network, network.get_submodule(layer), images(70))
    torch.testing.assert_close(views.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(views.features, features, rtol=1e-4, atol=1e-4)
    chosen = torch.tensor([3, 1])
    assert torch.equal(views.of(chosen).features, views.features[chosen])
    assert torch.equal(views.of(chosen).logits, views.logits[chosen])


class ConvolutionLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x))))).mean((2, 3))


def test_the_last_layer_may_be_a_convolution():
    network = trained(ConvolutionLast())
    views = Passes(searched(capture(network, SIZE)).blocks).views(images(5), CPU)
    features, logits = by_hook(network, network.last, images(5))
    torch.testing.assert_close(views.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(views.logits, logits, rtol=1e-4, atol=1e-5)


def test_prefixes_walk_both_streams_and_gradients_reach_the_images():
    blocks = searched(family("residual")).blocks
    passes = Passes(blocks)
    x = images(4).requires_grad_()
    for (start,) in passes.prefixes(x, 0):
        assert torch.equal(start, x)
    h_fp, h_q = passes.prefixes(x, 3)
    for values, kind in ((h_fp, "float_block"), (h_q, "quantized_block")):
        walked = (fast_layout(x),)
        for block in blocks[:3]:
            walked = getattr(block, kind)(*walked)
        assert all(torch.equal(a, b) for a, b in zip(values, walked, strict=True))
        (gradient,) = torch.autograd.grad(values[0].sum(), x, retain_graph=True)
        assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    assert not torch.equal(h_fp[0], h_q[0])


def test_the_rest_from_any_block_on_gives_the_same_views():
    blocks = searched(family("residual")).blocks
    passes = Passes(blocks)
    whole = passes.rest((images(4),), 0)
    for start in range(1, len(blocks)):
        with torch.no_grad():
            views = passes.rest(passes.prefixes(images(4), start)[0], start)
        torch.testing.assert_close(views.logits, whole.logits)
        torch.testing.assert_close(views.features, whole.features)


def test_after_the_last_layer_the_logits_stand_for_the_features():
    passes = Passes(searched(family("residual")).blocks)
    logits = images(3, (5, 1, 1)).flatten(1)
    views = passes.rest((logits,), len(passes.blocks))
    assert torch.equal(views.features, logits)
