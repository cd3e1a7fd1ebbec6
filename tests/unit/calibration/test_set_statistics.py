"""Distances are what their formula says, and chance is taken off them."""

import numpy as np
import pytest
import torch
from moments import set_moments
from networks import ResidualNet, images, trained
from torch import nn

from metaaug_cli.calibration.set_statistics import (
    collect,
    distance_between,
    distance_to_stored,
    standard_error,
    until,
)
from metaaug_cli.errors import InputError
from metaaug_cli.graph.bn_statistics import batch_norm_probe

SIZE = (3, 8, 8)


@pytest.fixture(scope="module")
def probe():
    return batch_norm_probe(trained(ResidualNet()), SIZE)


class _Plain(nn.Module):
    """A batch norm on the input itself, so that every statistic is known."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).mean((2, 3))


def plain_probe():
    return batch_norm_probe(_Plain().eval(), SIZE)


def test_moments_per_image_average_to_those_of_the_set(probe):
    batch = images(70)
    found = collect(probe.module, batch)
    whole = set_moments(probe, batch)
    assert len(found) == 70
    for mean, second, moments in zip(found.means, found.seconds, whole, strict=True):
        assert torch.allclose(mean.mean(0), moments.mean, atol=1e-5)
        assert torch.allclose(second.mean(0), moments.second, rtol=1e-4, atol=1e-5)


class _Tokens(nn.Module):
    """A batch norm over the tokens of all images in one dimension, as LeViT has it."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 4, 2, 2), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens.flatten(0, 1)).reshape_as(tokens).relu().mean(1))


def test_tokens_of_all_images_in_one_dimension_belong_to_their_images():
    network = trained(_Tokens())
    probe, batch = batch_norm_probe(network, SIZE), images(7)
    found = collect(probe.module, batch)
    tokens = network.patch(batch).flatten(2)
    torch.testing.assert_close(found.means[0], tokens.mean(2))
    torch.testing.assert_close(found.seconds[0], tokens.square().mean(2))
    assert len(distance_to_stored(found, probe.layers).layers) == 1


def test_the_first_layers_alone_see_the_same(probe):
    batch = images(5)
    whole, part = collect(probe.module, batch), collect(until(probe, 2), batch)
    assert len(part.means) == 2
    assert len(list(until(probe, 2).graph.nodes)) < len(list(probe.module.graph.nodes)) / 2
    for a, b in zip(whole.means, part.means, strict=False):
        assert torch.equal(a, b)
    assert part.outputs.shape == (5, 0)


def test_distance_equals_the_formula_in_numpy(probe):
    batch = images(12)
    found = collect(probe.module, batch)
    expected = []
    for mean, second, layer in zip(found.means, found.seconds, probe.layers, strict=True):
        a, b = mean.double().numpy(), second.double().numpy()
        mu, variance = layer.mean.double().numpy(), layer.variance.double().numpy()
        floor = 0.01 * variance.mean()
        m = a.mean(0)
        v = b.mean(0) - m**2
        shift = (m - mu) ** 2 / (variance + floor)
        spread = (0.5 * np.log((v + floor) / (variance + floor))) ** 2
        of_mean = a.var(0, ddof=1) / 12 / (variance + floor)
        of_log = (b - 2 * m * a).var(0, ddof=1) / 12 / (4 * (v + floor) ** 2)
        expected.append((shift + spread - of_mean - of_log).mean())
    distances = distance_to_stored(found, probe.layers)
    assert distances.squared.numpy() == pytest.approx(np.array(expected), rel=1e-3, abs=1e-5)
    assert distances.overall == pytest.approx(max(np.mean(expected), 0) ** 0.5, rel=1e-3)


def test_chance_is_taken_off_at_any_number_of_images():
    """Images of the stored distribution whose brightness varies a lot: the bare square would be 0.4 / N."""
    probe = plain_probe()
    generator = torch.Generator().manual_seed(0)
    for count in (8, 64):
        squares = []
        for _ in range(200):
            level = torch.randn(count, 3, 1, 1, generator=generator) * 0.4**0.5
            batch = level + torch.randn(count, 3, 8, 8, generator=generator) * 0.6**0.5
            squares.append(distance_to_stored(collect(probe.module, batch), probe.layers).squared.mean())
        average = float(torch.stack(squares).mean())
        assert abs(average) < 0.15 * 0.4 / count


def test_a_shift_and_a_scale_are_measured_in_stored_units():
    probe = plain_probe()
    batch = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted = distance_to_stored(collect(probe.module, batch + 0.5), probe.layers).overall
    wider = distance_to_stored(collect(probe.module, batch * 2), probe.layers).overall
    assert shifted == pytest.approx(0.5 / 1.01**0.5, rel=0.03)
    assert wider == pytest.approx(np.log(2), rel=0.03)


def test_a_channel_that_hardly_varies_does_not_decide():
    probe = plain_probe()
    probe.layers[0].variance[1] = 1e-12
    batch = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch[:, 1] *= 1e-3
    assert distance_to_stored(collect(probe.module, batch), probe.layers).overall < 0.1


def test_distance_between_sets_is_zero_only_for_equal_ones(probe):
    a, b = (collect(probe.module, images(16, seed=seed)) for seed in (1, 2))
    assert distance_between(a, a, probe.layers).overall == 0
    there, back = distance_between(a, b, probe.layers), distance_between(b, a, probe.layers)
    assert there.overall > 0
    assert torch.allclose(there.squared, back.squared)
    assert there.layers == pytest.approx(there.squared.sqrt().tolist())


def test_jackknife_of_a_mean_is_its_textbook_error():
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    left_out = (values.sum() - values) / 15
    assert standard_error(left_out) == pytest.approx(float(values.std() / 4), rel=1e-4)
    assert standard_error(left_out[:1]) == float("inf")


def test_values_that_are_no_numbers_are_refused(probe):
    with pytest.raises(InputError, match="NaN or infinite"):
        collect(probe.module, images(3) * 1e30)
