"""The pool of augmented copies: its range, its determinism, and that each operation does what it says."""

import pytest
import torch

from metaaug_cli.augment import OPERATIONS, augmented_copies, parse_kind
from metaaug_cli.cache import BlockData, Stream
from metaaug_cli.config import Recipe
from metaaug_cli.errors import RecipeError
from metaaug_cli.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((12, 16), None, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def normalised(count: int) -> torch.Tensor:
    """Random pixels in 0..1, normalised."""
    pixels = torch.rand(count, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return (pixels - mean) / std


def copies_of(images: torch.Tensor, kind: str, copies: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return augmented_copies(images, PREPROCESSING, kind, copies, generator)


@pytest.mark.parametrize("kind", [*OPERATIONS, "flip+crop+geometric+mixup"])
def test_copies_are_new_seeded_and_inside_the_pixel_range(kind):
    images = normalised(6)
    made = copies_of(images, kind)
    low, high = PREPROCESSING.pixel_bounds()
    assert made.shape == (12, 3, 12, 16)
    assert (made >= low.view(3, 1, 1) - 1e-5).all()
    assert (made <= high.view(3, 1, 1) + 1e-5).all()
    assert torch.equal(made, copies_of(images, kind))
    assert not torch.equal(made, copies_of(images, kind, seed=1))
    assert not torch.allclose(made[:6], images)


def test_a_flip_is_the_image_or_its_mirror():
    images = normalised(8)
    made = copies_of(images, "flip", copies=1)
    same = [torch.allclose(m, i, atol=1e-5) for m, i in zip(made, images, strict=True)]
    mirrored = [torch.allclose(m, i.flip(2), atol=1e-5) for m, i in zip(made, images, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_mixup_lies_between_two_images():
    images = normalised(2)
    made = copies_of(images, "mixup", copies=3)
    low, high = images.amin(0), images.amax(0)
    assert (made >= low - 1e-5).all()
    assert (made <= high + 1e-5).all()


def test_the_order_of_a_kind_does_not_matter():
    assert parse_kind("mixup+flip") == parse_kind("flip + mixup") == ["flip", "mixup"]


def test_an_unknown_operation_is_refused():
    with pytest.raises(RecipeError, match="sharpen"):
        parse_kind("flip+sharpen")
    with pytest.raises(RecipeError, match="augmentation"):
        Recipe().override(["augmentation.kind=sharpen"])


@pytest.mark.parametrize(
    ("settings", "images", "expected"),
    [
        ([], 32, 0),
        (["augmentation.kind=flip"], 32, 8),
        (["augmentation.kind=flip"], 1024, 2),
        (["augmentation.kind=flip"], 5000, 1),
        (["augmentation.kind=flip", "augmentation.copies=3"], 5000, 3),
    ],
)
def test_how_many_copies(settings, images, expected):
    assert Recipe().override(settings).augmentation.copies_for(images) == expected


def test_a_batch_takes_half_of_its_images_from_the_copies():
    values = (torch.arange(10.0).view(10, 1),)
    stream = Stream(values, torch.device("cpu"))
    data = BlockData(stream, stream, lambda x: (x,), None, (0,), originals=4)
    drawn = data.draw(200, torch.Generator().manual_seed(0))
    assert len(data) == 4
    assert (drawn < 4).sum() == 100
    assert set(drawn.tolist()) == set(range(10))
