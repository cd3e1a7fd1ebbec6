"""Real images are held back or learned from, made ones come after them, and copies after all."""

from dataclasses import replace

import pytest
import torch
from networks import SIZE, conv_bn, trained
from torch import nn

from metaaug_cli import learning_images as module
from metaaug_cli.calibration.data import (
    join_calibration_sets,
    load_calibration_set,
    make_calibration_set,
    save_calibration_set,
)
from metaaug_cli.errors import InputError, RecipeError
from metaaug_cli.learning_images import gather_images
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.synthesis.dgh import SynthesisSettings, synthesize_calibration_set

PREPROCESSING = Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.25,) * 3)
PIXELS = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(0))
REAL = make_calibration_set(PIXELS, PREPROCESSING, [f"{i}.png" for i in range(6)])
CPU = torch.device("cpu")


class Told:
    def __init__(self):
        self.steps, self.count = [], None

    def making_images(self, done, total, text):
        self.steps.append((done, total))

    def made_images(self, count):
        self.count = count


def network(*, batch_norm):
    first = conv_bn(3, 4) if batch_norm else nn.Conv2d(3, 4, 3)
    body = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return LoadedModel(trained(body).requires_grad_(False), "net", PREPROCESSING, "random", "0" * 64)


@pytest.fixture
def quick(monkeypatch):
    """Three steps an image instead of 150."""
    monkeypatch.setattr(module, "SynthesisSettings", lambda **given: SynthesisSettings(**given, iterations=3))


def images(*settings, model=None, told=None):
    recipe = Recipe().override(settings)
    return gather_images(model or network(batch_norm=True), REAL, recipe, CPU, told or Told()), recipe


def test_every_real_image_is_learned_from_or_held_back():
    found, _ = images("calibration.holdout=2")
    both = torch.cat([found.originals, found.held_back])
    assert len(found.held_back) == 2
    order = [int((REAL.images == image).flatten(1).all(1).nonzero()) for image in both]
    assert sorted(order) == list(range(6))
    assert images()[0].originals.equal(REAL.images)


def test_of_a_mixed_set_only_real_images_are_held_back(quick, tmp_path):
    made = synthesize_calibration_set(network(batch_norm=True), SynthesisSettings(num=4, iterations=2))
    mixed = join_calibration_sets(REAL, made)
    assert mixed.is_real.tolist() == [True] * 6 + [False] * 4
    save_calibration_set(mixed, tmp_path / "mixed.safetensors")
    first, most = (load_calibration_set(tmp_path / "mixed.safetensors", num=n) for n in (6, 7))
    assert (first.holds_synthetic, most.holds_synthetic) == (False, True)
    recipe = Recipe().override(["calibration.holdout=5", "seed=2"])
    found = gather_images(network(batch_norm=True), mixed, recipe, CPU, Told())
    assert all(any(torch.equal(image, real) for real in REAL.images) for image in found.held_back)
    assert (len(found.held_back), len(found.originals)) == (5, 5)
    with pytest.raises(RecipeError, match="7 images are to be held back and 6 of the set are real"):
        gather_images(
            network(batch_norm=True), mixed, recipe.override(["calibration.holdout=7"]), CPU, Told()
        )


def test_made_images_come_after_the_real_ones_and_are_never_held_back(quick):
    told, model = Told(), network(batch_norm=True)
    found, _ = images("calibration.synthetic=3", "calibration.holdout=2", "seed=5", model=model, told=told)
    assert len(found.originals) == 4 + 3
    made = synthesize_calibration_set(model, SynthesisSettings(num=3, seed=5, iterations=3))
    assert found.originals[4:].equal(made.images)
    assert told.steps[-1] == (3, 3)
    assert told.count == 3


def test_made_images_are_known_as_such_wherever_they_come_from(quick):
    assert not images()[0].holds_synthetic
    assert images("calibration.synthetic=2")[0].holds_synthetic
    made = synthesize_calibration_set(network(batch_norm=True), SynthesisSettings(num=2, iterations=3))
    for stored in (made, join_calibration_sets(REAL, made)):
        gathered = gather_images(network(batch_norm=True), stored, Recipe(), CPU, Told())
        assert gathered.holds_synthetic


def test_copies_are_made_of_all_of_them(quick):
    found, recipe = images("calibration.synthetic=2", "augmentation.kind=flip", "augmentation.copies=2")
    copies = found.with_copies(recipe)
    assert len(copies) == 3 * (6 + 2)
    assert copies[:8].equal(found.originals)
    mirrored = found.originals[7].flip(-1)
    assert any(c.equal(mirrored) or c.equal(found.originals[7]) for c in copies[8:])


def test_learned_copies_are_not_made_here():
    found, recipe = images("augmentation.kind=metaaug+flip", "quantization.act_bits=2")
    assert found.with_copies(recipe).equal(found.originals)


def test_a_network_without_batch_norms_is_told_how_to_go_on():
    with pytest.raises(InputError, match="no batch norms") as caught:
        images("calibration.synthetic=2", model=network(batch_norm=False))
    assert "leave --synthetic out" in caught.value.hint


def test_made_images_do_not_stand_beside_images_prepared_otherwise(quick):
    elsewhere = replace(PREPROCESSING, mean=(0.1, 0.1, 0.1))
    other = replace(network(batch_norm=True), preprocessing=elsewhere)
    with pytest.raises(InputError, match="prepared otherwise") as caught:
        images("calibration.synthetic=2", model=other)
    assert "--synthetic" in caught.value.hint
