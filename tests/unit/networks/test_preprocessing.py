"""Images become network input exactly as in torchvision's evaluation transform."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from metaaug_cli.errors import InputError
from metaaug_cli.networks import preprocessing as preprocessing_module
from metaaug_cli.networks.preprocessing import Preprocessing, resized_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(**changes):
    values = {"size": (24, 24), "resize": 28, "interpolation": "bilinear", "mean": MEAN, "std": STD}
    return Preprocessing(**(values | changes))


def photo(width, height, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (25, 200), (28, 28), (17, 20)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_equals_torchvision(size, interpolation):
    image = photo(*size)
    published = ImageClassification(
        crop_size=24, resize_size=28, mean=MEAN, std=STD, interpolation=InterpolationMode(interpolation)
    )
    expected = published(image)
    assert torch.equal(preprocessing(interpolation=interpolation)(image), expected)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((224, 224), (224, 224)),
        ((227, 300), (227, 300)),
        ((256, 256), (256, 256)),
        ((257, 300), (256, int(256 * 300 / 257))),
        ((500, 375), (int(256 * 500 / 375), 256)),
        ((223, 223), (256, 256)),
        ((32, 32), (256, 256)),
    ],
)
def test_auto_resizes_only_what_does_not_fit(image, expected):
    assert resized_size(image, (224, 224), "auto") == expected


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 60), st.integers(1, 60))
def test_auto_always_leaves_room_for_the_crop(height, width, crop_height, crop_width):
    crop = (crop_height, crop_width)
    resized = resized_size((height, width), crop, "auto")
    assert resized[0] >= crop[0]
    assert resized[1] >= crop[1]


def test_never_resizing_refuses_a_small_image():
    with pytest.raises(ValueError, match="20x30 px is smaller than the 24x24 crop"):
        preprocessing(resize=None)(photo(20, 30))
    pixels = preprocessing(resize=None).crop(photo(30, 26))
    assert torch.equal(pixels, torch.from_numpy(np.array(photo(30, 26)))[1:25, 3:27].permute(2, 0, 1))


def test_exif_orientation_is_applied():
    image = photo(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    turned = preprocessing()(Image.open(buffer))
    assert torch.equal(turned, preprocessing()(image.transpose(Image.Transpose.ROTATE_270)))
    assert not torch.equal(turned, preprocessing()(image))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb_and_grey(mode):
    grey = Image.fromarray(np.linspace(0, 255, 30 * 30).astype(np.uint8).reshape(30, 30))
    if mode == "I;16":
        image = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert(mode) if mode != "CMYK" else grey.convert("RGB").convert(mode)
    rgb = preprocessing(resize=None).crop(image)
    single = preprocessing(resize=None, mean=(0.5,), std=(0.5,)).crop(image)
    reference = torch.from_numpy(np.array(grey.convert("1").convert("L") if mode == "1" else grey))[
        3:27, 3:27
    ]
    assert rgb.shape == (3, 24, 24)
    assert single.shape == (1, 24, 24)
    assert (rgb.int() - reference.int()).abs().max() <= 1
    assert (single.int() - reference.int()).abs().max() <= 1


def test_palette_with_transparency_gives_its_colours_without_a_warning():
    image = Image.new("P", (30, 30), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = b"\x00\x80"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = preprocessing().crop(image)
    assert pixels[:, 5, 5].tolist() == [200, 100, 50]


def test_floating_point_images_are_refused():
    with pytest.raises(ValueError, match="no defined range"):
        preprocessing()(Image.new("F", (30, 30)))


def test_bounds_and_denormalise_invert_normalise():
    chosen = preprocessing()
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    images = chosen.normalise(pixels)
    low, high = chosen.pixel_bounds()
    assert torch.allclose(images.amin((1, 2)), low)
    assert torch.allclose(images.amax((1, 2)), high)
    assert torch.equal(chosen.denormalise(images).mul(255).round().byte(), pixels)
    assert torch.equal(chosen.to_pixels(images), pixels)
    assert chosen.to_pixels(images + 99).eq(255).all()
    assert chosen.to_pixels(images - 99).eq(0).all()


@pytest.mark.parametrize("resize", [None, "auto", 28])
def test_survives_json(resize):
    chosen = preprocessing(resize=resize, size=(24, 20))
    assert Preprocessing.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 24)}, "two positive numbers"),
        ({"resize": 20}, "smaller than the 24x24 crop"),
        ({"resize": "often"}, "'auto' or none"),
        ({"interpolation": "lanczos"}, "unknown interpolation"),
        ({"mean": (0.5,)}, "mean has 1 and std 3"),
        ({"std": (0.2, 0.0, 0.2)}, "above zero"),
        ({"mean": (float("nan"),) * 3}, "finite"),
        ({"mean": (123.675, 116.28, 103.53)}, "not on the \\[0, 1\\] pixel scale"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        preprocessing(**changes)


def test_stored_values_are_checked():
    with pytest.raises(InputError, match="unknown entries: crop, std"):
        Preprocessing.from_dict(
            {k: v for k, v in preprocessing().to_dict().items() if k != "std"} | {"crop": 1}
        )
    with pytest.raises(InputError, match="not valid"):
        Preprocessing.from_dict(preprocessing().to_dict() | {"size": [24]})


def test_differences_name_the_fields_and_forgive_rounding():
    other = preprocessing(mean=(0.4850001, 0.456, 0.406), resize="auto")
    assert preprocessing().differences(other) == ["resize: 28, not auto"]
    assert "24x24 RGB centre crop, resize 28 bilinear" in preprocessing().describe()


@pytest.mark.parametrize(
    ("greatest", "warned"), [((800, 4095, 60, 0), True), ((800, 65535, 60, 0), False), ((800, 60), False)]
)
def test_deep_grey_images_are_full_range_and_dark_sets_are_named_once(monkeypatch, caplog, greatest, warned):
    monkeypatch.setattr(preprocessing_module, "_deep_images", preprocessing_module._DeepImages())
    for value in (*greatest, *greatest[:1] * 3) if len(greatest) == 4 else greatest:
        pixels = preprocessing(resize=None).crop(Image.fromarray(np.full((30, 30), value, np.uint16)))
        assert pixels.unique().tolist() == [value // 256]
    assert [m[:44] for m in caplog.messages] == ["the 16-bit images hold values up to 4095 onl"] * warned


def test_whole_numbers_of_no_range_of_their_own_are_8_bits_where_they_fit():
    for value, shown in ((200, 200), (60_000, 60_000 // 256)):
        pixels = preprocessing(resize=None).crop(Image.fromarray(np.full((30, 30), value, np.int32)))
        assert pixels.unique().tolist() == [shown]
