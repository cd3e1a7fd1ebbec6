"""From a recipe to plain arguments: what ``auto`` stands for, and how many copies there are."""

import copy

import pytest
import torch
from networks import family, images, placed
from torch import nn

from metaaug_cli.calibration.data import SYNTHETIC_ORIGIN, make_calibration_set
from metaaug_cli.errors import GraphError, InputError, RecipeError
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.prepare import (
    augmentation_kind,
    copies_of,
    fitted_to,
    learns_augmenter,
    prepare_chain,
    require_finite,
    require_images,
)
from metaaug_cli.quantization.blocks import build_chain
from metaaug_cli.recipe.config import Recipe

HEAD = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
FIXED, LEARNED = "augmentation.kind=flip", "augmentation.kind=metaaug"


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ([], 0),
        ([FIXED], 8),
        ([FIXED, "augmentation.copies=3"], 3),
        ([FIXED, "reconstruction.method=nearest"], 0),
        ([LEARNED, "metaaug.form=residual"], 1),
        ([LEARNED], 8),
        ([LEARNED, "metaaug.form=policy", "reconstruction.method=nearest"], 0),
        (["augmentation.kind=metaaug+flip"], 8),
    ],
)
def test_copies_of_each_image(settings, each):
    assert copies_of(Recipe().override(settings), 32) == each


@pytest.mark.parametrize("kind", ["auto", " auto "])
@pytest.mark.parametrize(
    ("weight", "act", "learned"), [(2, 2, True), (2, 4, True), (4, 2, True), (4, 4, False)]
)
def test_auto_is_the_learned_augmenter_at_two_bits(kind, weight, act, learned):
    settings = [f"quantization.weight_bits={weight}", f"quantization.act_bits={act}"]
    recipe = Recipe(augmentation={"kind": kind}).override(settings)
    assert augmentation_kind(recipe) == ("metaaug" if learned else "none")
    assert learns_augmenter(recipe) == learned
    beside_made_ones = recipe.override(["calibration.synthetic=16"])
    assert augmentation_kind(beside_made_ones) == "none"
    assert augmentation_kind(beside_made_ones.override(["augmentation.kind=metaaug"])) == "metaaug"


def test_auto_is_nothing_where_the_set_itself_holds_made_images():
    recipe = Recipe().override(["quantization.weight_bits=2"])
    preprocessing = Preprocessing((8, 8), None, "bilinear", (0.5,) * 3, (0.5,) * 3)
    real = make_calibration_set(images(4), preprocessing, list("abcd"), origin="folder x")
    mixed = make_calibration_set(
        images(4), preprocessing, ["a", "b", "c", "synthetic-00000"], origin=f"{SYNTHETIC_ORIGIN} net"
    )
    assert augmentation_kind(fitted_to(recipe, real)) == "metaaug"
    assert augmentation_kind(fitted_to(recipe, mixed)) == "none"
    asked = recipe.override(["augmentation.kind=metaaug"])
    assert augmentation_kind(fitted_to(asked, mixed)) == "metaaug"


def test_images_are_left_to_learn_from():
    recipe = Recipe().override(["calibration.holdout=4"])
    require_images(5, recipe)
    with pytest.raises(RecipeError, match="4 of 4 images"):
        require_images(4, recipe)


def test_the_block_where_values_stop_being_numbers_is_named():
    module = copy.deepcopy(family("residual"))
    chain = build_chain(module, placed(module, "integer"))
    require_finite(chain, images(4))
    with torch.no_grad():
        next(chain.blocks[1].float_block.buffers()).fill_(float("inf"))
    with pytest.raises(InputError, match=f"block {chain.blocks[1].name}: .* NaN or infinite") as caught:
        require_finite(chain, images(4))
    assert "--mean" in caught.value.hint


class Changed(nn.Module):
    """A network whose logits go through ``change``."""

    def __init__(self, change):
        super().__init__()
        self.network, self.change = copy.deepcopy(HEAD), change

    def forward(self, x):
        return self.change(self.network(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:, :, None, None], r"gives \(5, 1, 1\) for an image"),
        (lambda y: y[:, :0], "it has 0 classes"),
        (lambda y: y + 1j, "complex64 numbers"),
        (lambda y: y.long(), "int64 numbers"),
    ],
)
def test_what_is_no_row_of_float_logits_is_refused(change, message):
    with pytest.raises(GraphError, match=message) as caught:
        prepare_chain(Changed(change).eval(), (3, 8, 8), Recipe())
    assert "(images, classes)" in caught.value.hint
