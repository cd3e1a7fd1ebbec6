"""The augmenter's forms: any image size, bounds that hold, an exact identity start, seeded policies."""

import pytest
import torch
from networks import images
from torch.nn import functional as F

from metaaug_cli.augmentation.augmenter import (
    MOST_LEVELS,
    Augmenter,
    AugmenterSpec,
    UNet,
    _warp,
    augment,
    image_variance,
    levels_for,
    project,
)
from metaaug_cli.networks.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((8, 8), None, "bilinear", (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def augmenter(form="unet", *, size=(8, 8), seed=0, **options):
    spec = AugmenterSpec(form=form, base_width=4, **options)
    return Augmenter(spec, PREPROCESSING, size, 1.0, seed=seed).eval()


def pictures(count=6):
    """Images inside the pixel range, some of their pixels at its ends."""
    bounds = [b.view(-1, 1, 1) for b in PREPROCESSING.pixel_bounds()]
    return images(count).clamp(*bounds)


@pytest.mark.parametrize("size", [(5, 5), (5, 40), (17, 31), (32, 32), (40, 33)])
@pytest.mark.parametrize("form", ["unet", "residual", "policy"])
def test_any_size_of_image_keeps_its_size(form, size):
    x = images(2, (3, *size))
    assert augmenter(form, size=size)(x).shape == x.shape


def test_padding_does_not_change_what_needs_none():
    """The border is repeated on the right and below only, so the image's own pixels stay where they are."""
    network = augmenter(size=(32, 32)).network
    assert network.levels == 3
    x = images(1, (3, 29, 32))
    by_hand = network(torch.cat([x, x[:, :, -1:].expand(-1, -1, 3, -1)], 2))[:, :, :29]
    torch.testing.assert_close(network(x), by_hand)


def test_the_smallest_map_is_four_pixels_or_more_where_that_is_possible():
    assert [levels_for((side, side)) for side in (224, 64, 32, 16, 8, 5)] == [4, 4, 3, 2, 1, 1]
    assert levels_for((224, 8)) == 1
    for side in range(8, 300):
        levels = levels_for((side, side))
        assert side >= 4 * 2**levels
        assert levels == MOST_LEVELS or side < 4 * 2 ** (levels + 1)


def test_the_projection_holds_the_ball_exactly():
    x = images(5)
    change = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    change *= torch.tensor([0.0, 0.1, 1.0, 10.0, 1000.0]).view(-1, 1, 1, 1)
    made = project(x, x + change, 0.25)
    distance = (made - x).square().flatten(1).mean(1)
    torch.testing.assert_close(distance[2:], torch.full((3,), 0.25), rtol=1e-4, atol=0)
    torch.testing.assert_close(made[:2], (x + change)[:2])
    turned = F.cosine_similarity((made - x)[2:].flatten(1), change[2:].flatten(1))
    torch.testing.assert_close(turned, torch.ones(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["unet", "residual", "policy"])
def test_outputs_are_pixels_and_inside_the_distance(form):
    made_by = augmenter(form, epsilon=0.05)
    for parameter in made_by.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 2
    x = pictures()
    made = made_by(x, made_by.draw(len(x), torch.Generator().manual_seed(0)))
    assert not torch.equal(made, x)
    pixels = PREPROCESSING.denormalise(made.detach())
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    if form != "policy":  # clamping to the pixel range draws nothing away from an image that lies in it
        assert (made - x).square().flatten(1).mean(1).max() <= 0.05 * 1.0001


def test_without_projection_the_distance_is_the_losses_affair():
    made_by = augmenter("residual", epsilon=0.05, distance="margin")
    made_by.network.last.bias.data.fill_(1.0)
    x = torch.zeros(2, 3, 8, 8)
    torch.testing.assert_close(made_by(x).square().mean(), torch.tensor(1.0))


def test_the_residual_form_starts_exactly_at_the_identity():
    x = pictures()
    assert torch.equal(augmenter("residual")(x), x)
    assert not torch.equal(augmenter("unet")(x), x)


def test_the_policy_follows_its_generator_and_is_differentiable():
    made_by, x = augmenter("policy"), pictures()

    def made(seed):
        return made_by(x, made_by.draw(len(x), torch.Generator().manual_seed(seed)))

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    made(1).square().sum().backward()
    gradient = made_by.network.strengths.weight.grad
    assert bool((gradient.abs().sum(1) > 0).all()), "every strength has a gradient"


def test_a_policy_without_strength_changes_nothing():
    made_by, x = augmenter("policy"), pictures()
    made_by.network.strengths.bias.data.fill_(-60.0)
    torch.testing.assert_close(made_by(x), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (32, 96), (96, 32)])
def test_a_rotation_turns_pixels_whatever_the_sides(size):
    """A round spot in the middle looks the same from every angle; a line along the width does not."""
    row, column = (torch.arange(n) - (n - 1) / 2 for n in size)
    spot = torch.exp(-(row[:, None].square() + column.square()) / 50)[None, None]
    line = torch.exp(-row[:, None].square() / 8).expand(1, 1, *size)
    turned = torch.tensor([[1.0, 0, 0, 0, 0]])
    torch.testing.assert_close(_warp(spot, turned), spot, rtol=0, atol=0.02)
    away = 10  # pixels beside the middle, where the line has moved by away * tan(15 degrees)
    at = _warp(line, turned)[0, 0, :, int(column.numel() / 2) + away].argmax() - line[0, 0, :, 0].argmax()
    assert abs(int(at)) in (2, 3)


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, same, other = (augmenter(seed=s).network.last.weight for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_chunks_do_not_matter():
    made_by, x = augmenter(), pictures(7)
    torch.testing.assert_close(augment(made_by, x, chunk=3), augment(made_by, x))
    assert not augment(made_by, x).requires_grad


def test_image_variance_is_that_around_each_channels_mean():
    x = images(9) + torch.tensor([0.0, 5.0, -3.0]).view(1, 3, 1, 1)
    by_hand = sum(x[:, c].numpy().var() for c in range(3)) / 3
    assert image_variance(x) == pytest.approx(float(by_hand), rel=1e-4)


def test_a_unet_has_a_skip_at_every_level():
    network = UNet(3, 4, 2)
    assert (len(network.down), len(network.up), len(network.merge)) == (3, 2, 2)
    assert [m[0].in_channels for m in network.merge] == [16, 8]
