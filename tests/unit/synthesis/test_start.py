"""Where a synthesis starts: images that differ from each other as photographs do."""

import pytest
import torch

from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.synthesis.start import natural_noise, white_noise

RESIZE = {"resize": None, "interpolation": "bilinear"}
PREPARED = Preprocessing(size=(32, 48), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1), **RESIZE)
PLAIN = Preprocessing(size=(32, 48), mean=(0.0,) * 3, std=(1.0,) * 3, **RESIZE)


def drawn(preprocessing=PLAIN, count=400, seed=0, size=(32, 48)):
    return natural_noise(count, size, preprocessing, torch.Generator().manual_seed(seed))


def test_the_set_has_the_mean_and_deviation_of_photographs_in_pixels():
    images = drawn()
    assert images.shape == (400, 3, 32, 48)
    assert float(images.mean()) == pytest.approx(0.45, abs=0.02)
    assert float(images.std()) == pytest.approx(0.27, rel=0.1)


def test_images_differ_in_brightness_and_contrast():
    images = drawn()
    between = float(images.mean((2, 3)).var(0).mean() / images.var((0, 2, 3)).mean())
    assert between == pytest.approx(0.2, abs=0.05)
    contrast = images.std((2, 3)).mean(1)
    assert float(contrast.max() / contrast.min()) > 2
    plain = white_noise(400, (32, 48), PLAIN, torch.Generator().manual_seed(0))
    assert float(plain.mean((2, 3)).var(0).mean() / plain.var((0, 2, 3)).mean()) < 0.01


def test_channels_share_most_of_their_variance():
    pixels = drawn().transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(pixels)[0, 1:]
    assert correlation.tolist() == pytest.approx([0.8, 0.8], abs=0.05)


def test_amplitudes_fall_as_one_over_the_frequency():
    images = drawn(count=200, size=(64, 64))[:, 0]
    images = images - images.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(images).abs().square().mean(0)
    lines = torch.stack([power[0, 1:32], power[1:32, 0]]).mean(0)
    frequency = torch.arange(1.0, 32.0)
    slope = torch.linalg.lstsq(
        torch.stack([frequency.log(), torch.ones(31)], 1), lines.log()[:, None]
    ).solution[0]
    assert float(slope) == pytest.approx(-2.0, abs=0.15)


def test_images_are_normalised_and_follow_the_generator():
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (PREPARED.mean, PREPARED.std))
    torch.testing.assert_close(drawn(PREPARED, 3), (drawn(count=3) - mean) / std)
    assert torch.equal(drawn(count=3), drawn(count=3))
    assert not torch.equal(drawn(count=3), drawn(count=3, seed=1))


def test_grey_images_have_one_channel():
    grey = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,), **RESIZE)
    assert natural_noise(2, (8, 8), grey, torch.Generator().manual_seed(0)).shape == (2, 1, 8, 8)
