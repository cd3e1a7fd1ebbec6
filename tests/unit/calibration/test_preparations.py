"""Every guess undoes the mistake it is named after."""

from dataclasses import replace

import pytest
import torch

from metaaug_cli.calibration.preparations import other_preparations
from metaaug_cli.networks.preprocessing import Preprocessing

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RIGHT = Preprocessing((4, 4), None, "bilinear", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
PIXELS = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PIXELS[0, :, 0, 0], PIXELS[0, :, 0, 1] = 0.0, 1.0


def normalised(pixels, preprocessing=RIGHT):
    shape = (len(preprocessing.mean), 1, 1)
    return (pixels - torch.tensor(preprocessing.mean).view(shape)) / torch.tensor(preprocessing.std).view(
        shape
    )


def guesses(images, preprocessing=RIGHT):
    pixels = preprocessing.denormalise(images)
    return {g.name: g for g in other_preparations(preprocessing, float(pixels.min()), float(pixels.max()))}


def undone(images, name, preprocessing=RIGHT):
    return guesses(images, preprocessing)[name].change(images)


STORED_WRONG = {
    "bgr": normalised(PIXELS.flip(1)),
    "negative": normalised(1 - PIXELS),
    "pixels 0 to 255": PIXELS * 255,
    "pixels 0 to 1": PIXELS,
    "pixels divided twice": normalised(PIXELS / 255),
    "normalised pixels 0 to 255": normalised(PIXELS * 255),
    "pixels normalised twice": normalised(normalised(PIXELS)),
    "normalised by 0.485 0.456 0.406 / 0.229 0.224 0.225": normalised(
        PIXELS, replace(RIGHT, mean=IMAGENET[0], std=IMAGENET[1])
    ),
}


@pytest.mark.parametrize("name", STORED_WRONG)
def test_the_guess_gives_the_right_images_back(name):
    assert torch.allclose(undone(STORED_WRONG[name], name), normalised(PIXELS), atol=2e-4)


def test_a_wrong_statement_is_undone_with_and_without_swapped_channels():
    stated = replace(RIGHT, mean=IMAGENET[0], std=IMAGENET[1])
    name = "normalisation 0.4914 0.4822 0.4465 / 0.247 0.2435 0.2616"
    assert torch.allclose(undone(normalised(PIXELS, stated), name, stated), normalised(PIXELS), atol=1e-5)
    swapped = normalised(PIXELS.flip(1), stated)
    assert torch.allclose(undone(swapped, f"bgr, {name}", stated), normalised(PIXELS), atol=1e-5)
    guess = guesses(swapped, stated)[f"bgr, {name}"]
    assert guess.finding.startswith("look like BGR where the model expects RGB, and are normalised with")
    assert "--mean 0.4914,0.4822,0.4465" in guess.remedy


def test_what_the_set_already_is_is_no_guess():
    names = guesses(normalised(PIXELS))
    assert not any("0.4914" in name for name in names)
    assert any("0.485" in name for name in names)
    # Ordinary pixels were not stored on another scale.
    assert not any(name.startswith(("pixels", "normalised")) for name in names)


def test_values_that_are_no_pixels_are_a_question_of_scale_only():
    names = guesses(PIXELS * 255)
    assert all(name.startswith(("pixels", "normalised")) for name in names)


def test_grey_images_have_no_order_of_channels():
    grey = Preprocessing((4, 4), None, "bilinear", (0.5,), (0.5,))
    found = guesses(normalised(PIXELS[:, :1], grey), grey)
    assert not any("bgr" in name for name in found)
    assert {"negative", "normalisation 0.1307 / 0.3081"} <= set(found)
