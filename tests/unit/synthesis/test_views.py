"""Views of synthetic images: sizes, randomness, smoothing and the range of pixels."""

import math

import pytest
import torch

from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.synthesis.views import Views, gaussian_kernel, margin

PREPROCESSING = Preprocessing((16, 12), None, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def views(*, enabled=True):
    return Views(PREPROCESSING, enabled=enabled, device=torch.device("cpu"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("side", "pixels"), [(224, 32), (299, 32), (128, 32), (96, 24), (32, 8), (28, 6), (8, 2), (4, 2)]
)
def test_the_margin_is_the_published_one_or_a_quarter(side, pixels):
    assert margin((side, side)) == pixels
    assert margin((side, 2 * side)) == pixels


def test_kernel_is_the_sampled_gaussian():
    kernel = gaussian_kernel(1.25)[0, 0]
    weights = [[math.exp(-(i * i + j * j) / (2 * 1.25**2)) for j in (-1, 0, 1)] for i in (-1, 0, 1)]
    torch.testing.assert_close(kernel, torch.tensor(weights) / sum(map(sum, weights)))


@pytest.mark.parametrize("enabled", [True, False])
def test_sizes_and_pixel_range(enabled):
    shown = views(enabled=enabled)
    stored = 5 * torch.randn(4, 3, *shown.stored_size, generator=generator())
    assert shown.stored_size == ((18, 14) if enabled else (16, 12))
    for images in (shown.drawn(stored, generator()), shown.final(stored)):
        assert images.shape == (4, 3, 16, 12)
        pixels = PREPROCESSING.denormalise(images)
        assert -1e-6 <= float(pixels.min()) <= float(pixels.max()) <= 1 + 1e-6


def test_the_final_image_is_the_smoothed_middle():
    shown = views()
    stored = torch.zeros(1, 3, *shown.stored_size)
    stored[0, 1, 5, 6] = 1.0
    spot = shown.final(stored)[0, 1]
    torch.testing.assert_close(spot[3:6, 4:7], gaussian_kernel(1.25)[0, 0])
    assert int((spot != 0).sum()) == 9


def test_views_flip_and_move_at_random():
    shown = views()
    stored = torch.randn(64, 3, *shown.stored_size, generator=generator()) * 0.1
    first, again, other = (shown.drawn(stored, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    smoothed = shown._smooth(stored)
    crops = [smoothed[:, :, t : t + 16, c : c + 12] for t in range(3) for c in range(3)]
    crops += [
        shown._smooth(stored.flip(-1))[:, :, t : t + 16, c : c + 12] for t in range(3) for c in range(3)
    ]
    found = [sum(bool(torch.equal(c[i], first[i])) for c in crops) for i in range(64)]
    assert found == [1] * 64
    flipped = sum(any(bool(torch.equal(c[i], first[i])) for c in crops[9:]) for i in range(64))
    assert 16 < flipped < 48


def test_clipped_pixels_keep_their_gradient():
    shown = views(enabled=False)
    stored = torch.full((1, 3, 16, 12), 9.0, requires_grad=True)
    shown.drawn(stored, generator()).sum().backward()
    assert torch.equal(stored.grad, torch.ones_like(stored))
