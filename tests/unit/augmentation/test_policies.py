"""TrivialAugment and RandAugment: which transforms are drawn, how far they go, and whose randomness it is."""

from collections import Counter

import pytest
import torch
from torchvision.transforms import v2

from metaaug_cli.augmentation.policies import (
    ALL,
    GEOMETRIC,
    PHOTOMETRIC,
    drawing_from,
    random_policy,
    trivial_policy,
)

CLASSES = [(v2.TrivialAugmentWide, trivial_policy, 1), (v2.RandAugment, random_policy, 2)]
HALVES = [ALL, GEOMETRIC, PHOTOMETRIC]


def images(count, size=(8, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator) / 255


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_fourteen_transforms_and_their_halves():
    assert len(ALL) == 14
    assert {"Identity"} == GEOMETRIC & PHOTOMETRIC
    for transform, _, _ in CLASSES:
        assert set(transform._AUGMENTATION_SPACE) == ALL


@pytest.mark.parametrize(("transform", "policy", "each"), CLASSES)
@pytest.mark.parametrize("names", HALVES)
def test_every_transform_of_the_half_is_drawn_and_no_other(monkeypatch, transform, policy, each, names):
    drawn = Counter()

    def note(_self, image, name, _magnitude, **_options):
        drawn[name] += 1
        return image

    monkeypatch.setattr(transform, "_apply_image_or_video_transform", note)
    policy(names)(images(400), seeded())
    assert set(drawn) == names
    assert sum(drawn.values()) == 400 * each
    assert min(drawn.values()) > 0.4 * 400 * each / len(names)


@pytest.mark.parametrize(("transform", "policy", "each"), CLASSES)
def test_geometric_transforms_only_move_pixels(transform, policy, each):
    """No colour appears that is not in the image, but for its mean."""
    left = torch.tensor([20, 200, 90]).view(3, 1, 1)
    right = torch.tensor([220, 40, 150]).view(3, 1, 1)
    image = torch.where(torch.arange(16) < 8, left, right).expand(3, 16, 16) / 255
    made = policy(GEOMETRIC)(image.expand(60, 3, 16, 16), seeded())
    codes = made.mul(255).round().long()
    known = torch.stack([left, right, (left + right) // 2])
    found = (codes.unsqueeze(1) == known.unsqueeze(0)).all(2).any(1)
    assert found.all()
    assert len({tuple(m.flatten().tolist()) for m in codes}) > 20


@pytest.mark.parametrize(("transform", "policy", "each"), CLASSES)
def test_photometric_transforms_keep_positions(transform, policy, each):
    """Four flat quarters stay flat, but at the edges between them, which sharpness changes."""
    colours = torch.randint(0, 256, (3, 2, 2), generator=seeded(4)) / 255
    image = colours.repeat_interleave(8, 1).repeat_interleave(8, 2)
    made = policy(PHOTOMETRIC)(image.expand(60, 3, 16, 16), seeded())
    quarters = made.unflatten(3, (2, 8)).unflatten(2, (2, 8))[:, :, :, 2:6, :, 2:6]
    assert (quarters - quarters[:, :, :, :1, :, :1]).abs().max() < 0.01
    assert len({tuple(m.flatten().tolist()) for m in made}) > 15


def test_shifts_are_a_share_of_the_side():
    """At 224 pixels the published 32; at 32 pixels as much of the image, not all of it."""
    for size, furthest in ((32, 4), (56, 8)):
        marked = torch.zeros(200, 3, size, size)
        marked[:, :, size // 2, size // 2] = 1
        made = trivial_policy(frozenset({"TranslateX", "TranslateY"}))(marked, seeded())
        where = (made[:, 0] > 0.5).nonzero()[:, 1:] - size // 2
        assert len(where) == 200
        assert where.abs().amax(0).tolist() == [furthest, furthest]
        assert (where.amin(0) < 0).all()
        assert (where.amax(0) > 0).all()


def test_the_identity_gives_the_eight_bit_image():
    floats = torch.rand(3, 3, 8, 8, generator=seeded())
    made = trivial_policy(frozenset({"Identity"}))(floats, seeded())
    torch.testing.assert_close(made, floats.mul(255).round() / 255)
    exact = images(3)
    torch.testing.assert_close(trivial_policy(frozenset({"Identity"}))(exact, seeded()), exact)


def test_torchvisions_own_classes_keep_their_space():
    before = dict(v2.TrivialAugmentWide._AUGMENTATION_SPACE)
    trivial_policy(GEOMETRIC)(images(2), seeded())
    assert before == v2.TrivialAugmentWide._AUGMENTATION_SPACE


def test_drawing_from_a_generator_continues_it_and_leaves_the_global_one():
    torch.manual_seed(7)
    outside = torch.get_rng_state()
    reference = seeded()
    expected = [torch.rand(3, generator=reference) for _ in range(2)]
    generator = seeded()
    with drawing_from(generator):
        first = torch.rand(3)
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.rand(3, generator=generator), expected[1])
    assert torch.equal(torch.get_rng_state(), outside)


def test_the_global_generator_is_put_back_after_a_failure():
    outside = torch.get_rng_state()

    def draw_and_fail():
        with drawing_from(seeded()):
            torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), outside)
