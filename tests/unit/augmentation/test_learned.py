"""The learned augmenter over a run: its state carries everything, its copies are counted, trouble is told."""

import pytest
import torch
from augmenters import CPU, PICTURES, PREPROCESSING, data_of, learned_augmentation, teach

from metaaug_cli.augmentation.learned import SHOWN_IMAGES, distance_note, similarity_note


@pytest.mark.parametrize("form", ["residual", "unet", "policy"])
@pytest.mark.parametrize("balanced", [True, False])
def test_a_saved_augmenter_goes_on_as_if_nothing_had_happened(form, balanced):
    """Weights, Adam's moments and steps, what balances the terms: the next block is taught the same."""
    learned = learned_augmentation(form, balanced=balanced)
    teach(learned, 1)
    resumed = learned_augmentation(form, balanced=balanced)
    resumed.load({name: value.clone() for name, value in learned.state().items()})
    histories = [teach(each, 2, seed=5) for each in (learned, resumed)]
    assert histories[0].records == histories[1].records
    again = resumed.state()
    for name, value in learned.state().items():
        assert torch.equal(value, again[name]), name
    assert any(name.startswith("optimizer/0/exp_avg_sq") for name in again)


def test_only_a_unet_is_warmed_up(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "metaaug_cli.augmentation.learned.warm_up", lambda t, x, **options: asked.append(options)
    )
    for form in ("residual", "policy", "unet"):
        learned_augmentation(form).warm_up(7)
    assert asked == [{"steps": 7, "seed": 0, "tick": None}]


@pytest.mark.parametrize(
    ("form", "operations", "count"),
    [("residual", "none", 12), ("residual", "flip", 36), ("policy", "none", 36), ("policy", "flip", 36)],
)
def test_copies_of_each_image(form, operations, count):
    learned = learned_augmentation(form, operations=operations)
    made = learned.make(data_of(learned, 1)[0], torch.Generator().manual_seed(0))
    assert made.images.shape == (count, 3, 8, 8)
    pixels = PREPROCESSING.denormalise(made.images)
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_what_is_shown_is_t_without_the_operations():
    learned = learned_augmentation(operations="brightness")
    learned.augmenter.network.last.bias.data.fill_(0.1)
    made = learned.make(data_of(learned, 1)[0], torch.Generator().manual_seed(0))
    assert made.originals.shape == (SHOWN_IMAGES, 3, 8, 8)
    assert torch.equal(made.originals[0], PICTURES[0])
    assert torch.equal(made.originals[-1], PICTURES[-1])
    torch.testing.assert_close(made.changed, (made.originals + 0.1).clamp(-1, 1))
    everyone = ((PICTURES + 0.1).clamp(-1, 1) - PICTURES).square().mean() / learned.variance
    assert made.distance == pytest.approx(float(everyone), rel=1e-4)


def test_similarity_is_that_of_centred_features():
    learned = learned_augmentation()
    learned.augmenter.network.last.bias.data.fill_(0.3)
    made = learned.make(data_of(learned, 1)[0], torch.Generator())
    with torch.no_grad():
        features, changed = (learned.passes.views(x, CPU).features.double() for x in (PICTURES, made.images))
    a, b = features - features.mean(0), changed - features.mean(0)
    by_hand = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    assert made.similarity == pytest.approx(float(by_hand), rel=1e-4)
    assert 0 < made.similarity < 1


def test_a_single_image_is_recognised():
    learned = learned_augmentation(pictures=PICTURES[:1])
    made = learned.make(data_of(learned, 1)[0], torch.Generator())
    assert made.similarity == pytest.approx(1.0)


def test_a_collapsed_augmenter_is_warned_about(caplog):
    learned = learned_augmentation()
    block, _ = data_of(learned, 1)
    made = learned.make(block, torch.Generator())
    assert made.distance == 0.0
    assert made.similarity == pytest.approx(1.0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"block {block.name}: the augmenter has collapsed to the identity" in record.message
    assert "metaaug.val_weight" in record.message, "the margin has no gradient there"
    with caplog.at_level("INFO"):
        learned.make(data_of(learned, 2)[0], torch.Generator())
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"], "one cure is named once"


def test_unrecognisable_images_are_warned_about(caplog):
    learned = learned_augmentation(spec={"distance": "margin"})
    learned.augmenter.network.last.bias.data.fill_(50.0)  # every image becomes white
    made = learned.make(data_of(learned, 1)[0], torch.Generator())
    assert made.similarity < 0.5
    (record,) = caplog.records
    assert "the network hardly recognises the augmented images" in record.message


def test_nothing_is_said_between_the_bounds():
    assert distance_note(0.021 * 0.3, 0.3) is None
    assert "metaaug.margin_weight" in distance_note(0.019 * 0.3, 0.3)
    assert similarity_note(0.51) is None
    assert similarity_note(0.49) is not None
