"""The sheet of images: originals above, T(x) below, enlarged without blurring."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.runs.augmentation_sheet import sheet_png


def sheet(originals, changed, channels=3):
    preprocessing = Preprocessing(
        originals.shape[2:], None, "bilinear", (0.5,) * channels, (0.25,) * channels
    )
    return np.asarray(Image.open(io.BytesIO(sheet_png(originals, changed, preprocessing, 1.0))))


def constant(pixel, side=8, count=2, channels=3):
    """Images of one pixel value in [0, 255], normalised."""
    return torch.full((count, channels, side, side), (pixel / 255 - 0.5) / 0.25)


def test_originals_are_above_and_changed_images_below():
    picture = sheet(constant(10), constant(200))
    side = 8 * 14
    assert picture.shape == (2 * (side + 6) + 20, 72 + 2 * (side + 6), 3)
    for column in (72, 72 + side + 6):
        assert (picture[:side, column : column + side] == 10).all()
        assert (picture[side + 6 : 2 * side + 6, column : column + side] == 200).all()


def test_small_images_are_enlarged_without_blurring():
    original = constant(0, count=1)
    original[0, :, 0, 0] = (1 - 0.5) / 0.25
    tile = sheet(original, original)[:112, 72:184, 0]
    assert (tile[:14, :14] == 255).all()
    assert set(np.unique(tile)) == {0, 255}
    assert int((tile == 255).sum()) == 14 * 14


@pytest.mark.parametrize(("side", "shown"), [(32, 128), (64, 128), (224, 224)])
def test_large_images_keep_their_size(side, shown):
    assert sheet(constant(1, side, 1), constant(1, side, 1)).shape[:2] == (
        2 * (shown + 6) + 20,
        72 + shown + 6,
    )


def test_labels_and_distances_are_written():
    picture = sheet(constant(10), constant(200))
    assert (picture[:, :60] < 100).any(axis=(1, 2)).sum() > 10
    under = picture[2 * 118 :, 72:]
    assert (under < 100).any()


def test_one_channel_is_grey_and_what_is_no_pixel_is_clipped():
    picture = sheet(constant(10, channels=1), constant(900, channels=1), channels=1)
    assert (picture[:112, 72:184] == 10).all()
    assert (picture[118:230, 72:184] == 255).all()
