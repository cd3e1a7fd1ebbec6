"""The pool of augmented copies: its range, its determinism, and that each operation does what it says."""

import pytest
import torch

from metaaug_cli.augmentation.fixed import OPERATIONS, augmented_copies
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.quantization.cache import BlockData, Stream
from metaaug_cli.recipe.config import Recipe

PREPROCESSING = Preprocessing((12, 16), None, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PLAIN = Preprocessing((12, 16), None, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
GREY = Preprocessing((12, 16), None, "bilinear", (0.5,), (0.25,))


def pixels(count: int, channels: int = 3, size: tuple[int, int] = (12, 16), seed: int = 1) -> torch.Tensor:
    """Random 8-bit pixels in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, *size), generator=generator) / 255


def normalised(count: int) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return (pixels(count) - mean) / std


def copies_of(images, kind, copies=2, seed=0, preprocessing=PREPROCESSING):
    generator = torch.Generator().manual_seed(seed)
    return augmented_copies(images, preprocessing, kind, copies, generator)


def changed(images, kind, copies=1, seed=0):
    """Copies of images whose pixels are already what the network takes."""
    return copies_of(images, kind, copies, seed, PLAIN)


@pytest.mark.parametrize("kind", [*OPERATIONS, "flip+crop+geometric+mixup", "trivial-geometric+cutmix"])
def test_copies_are_new_seeded_and_inside_the_pixel_range(kind):
    images = normalised(6)
    before = images.clone()
    made = copies_of(images, kind)
    low, high = PREPROCESSING.pixel_bounds()
    assert made.shape == (12, 3, 12, 16)
    assert made.dtype == torch.float32
    assert (made >= low.view(3, 1, 1) - 1e-5).all()
    assert (made <= high.view(3, 1, 1) + 1e-5).all()
    assert torch.equal(made, copies_of(images, kind))
    assert not torch.equal(made, copies_of(images, kind, seed=1))
    assert not torch.allclose(made[:6], images)
    assert not torch.equal(made[:6], made[6:])
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_the_generator_is_the_only_randomness(kind):
    images = normalised(4)
    first = copies_of(images, kind)
    torch.manual_seed(5)
    outside = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    start = generator.get_state()
    made = augmented_copies(images, PREPROCESSING, kind, 2, generator)
    assert torch.equal(made, first)
    assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(generator.get_state(), start)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_grey_images_and_a_single_image(kind):
    grey = pixels(5, channels=1) * 4 - 2
    made = copies_of(grey, kind, preprocessing=GREY)
    assert made.shape == (10, 1, 12, 16)
    assert made.isfinite().all()
    assert not torch.allclose(made, grey.repeat(2, 1, 1, 1))
    assert copies_of(grey[:1], kind, copies=3, preprocessing=GREY).shape == (3, 1, 12, 16)


def test_none_repeats_the_images():
    images = normalised(3)
    torch.testing.assert_close(copies_of(images, "none"), images.repeat(2, 1, 1, 1))


def test_a_flip_is_the_image_or_its_mirror():
    images = normalised(8)
    made = copies_of(images, "flip", copies=1)
    same = [torch.allclose(m, i, atol=1e-5) for m, i in zip(made, images, strict=True)]
    mirrored = [torch.allclose(m, i.flip(2), atol=1e-5) for m, i in zip(made, images, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_a_crop_enlarges_a_part():
    ramp = torch.linspace(0, 1, 16).expand(20, 3, 12, 16)
    made = changed(ramp, "crop")
    slope = (made[..., 12] - made[..., 3]) / (ramp[..., 12] - ramp[..., 3])
    assert (slope < 1 + 1e-5).all()
    assert (slope > 0.6**0.5 - 0.1).all()
    assert slope.std() > 0.02


@pytest.mark.parametrize("kind", ["rotate", "geometric"])
def test_what_comes_into_view_has_the_mean_colour(kind):
    """Bilinear moves only blend, so a two-colour image stays on the line between its colours."""
    colours = torch.tensor([[0.1, 0.8, 0.3], [0.9, 0.2, 0.6]])
    halves = torch.where(torch.arange(16) < 8, colours[0].view(3, 1, 1), colours[1].view(3, 1, 1))
    images = halves.expand(40, 3, 12, 16).contiguous()
    made = changed(images, kind)
    share = (made[:, 0] - 0.1) / 0.8
    line = colours[0].view(3, 1, 1) + share.unsqueeze(1) * (colours[1] - colours[0]).view(3, 1, 1)
    torch.testing.assert_close(made, line, atol=1e-5, rtol=0)
    assert ((share > -1e-4) & (share < 1 + 1e-4)).all()
    corners = made[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.isclose(corners, colours.mean(0).view(3, 1), atol=0.02).all(1).any()


def test_a_plain_image_has_no_edge_after_it_was_moved():
    """A fill that is blended wrongly shows as a dark seam around the moved image."""
    plain = torch.full((30, 3, 12, 16), 0.7)
    for kind in ("rotate", "geometric", "trivial-geometric", "rand-geometric"):
        made = changed(plain, kind)
        assert (made - 0.7).abs().max() < 0.003, kind


def test_a_rotation_keeps_the_centre_and_turns_both_ways():
    spot = torch.zeros(40, 3, 17, 17)
    spot[:, :, 8, 8] = 1
    assert (changed(spot, "rotate")[:, 0, 8, 8] > 0.9).all()
    bar = torch.zeros(40, 3, 17, 17)
    bar[:, :, :, 8] = 1
    top = changed(bar, "rotate")[:, 0, 1].argmax(1)
    assert top.min() < 8 < top.max()
    assert (top - 8).abs().max() <= 5  # 7 rows above the centre, tan(30 degrees)


def test_brightness_scales_every_pixel_alike():
    images = pixels(30) * 0.7  # no factor up to 1.4 clips these
    made = changed(images, "brightness")
    factor = (made.flatten(1).sum(1) / images.flatten(1).sum(1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(made, images * factor)
    assert 0.6 <= factor.min() < 0.75
    assert 1.25 < factor.max() <= 1.4


def test_contrast_scales_the_distance_to_the_mean_grey():
    images = 0.4 + pixels(30) * 0.2
    made = changed(images, "contrast")
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601
    grey = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    factor = ((made - grey).flatten(1).norm(dim=1) / (images - grey).flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(made, grey + factor * (images - grey), atol=1e-4, rtol=0)
    assert 0.6 <= factor.min() < 0.75
    assert 1.25 < factor.max() <= 1.4


@pytest.mark.parametrize("kind", ["brightness", "contrast", "photometric"])
def test_photometric_operations_keep_positions(kind):
    """Equal pixels stay equal wherever they are, so a shuffled image gives the shuffled result."""
    images = pixels(6)
    order = torch.randperm(12 * 16, generator=torch.Generator().manual_seed(3))
    shuffled = images.flatten(2)[..., order].view_as(images)
    expected = changed(images, kind).flatten(2)[..., order].view_as(images)
    torch.testing.assert_close(changed(shuffled, kind), expected, atol=1e-5, rtol=0)


def test_mixup_is_a_convex_combination_of_two_images():
    images = pixels(5)
    for i, made in enumerate(changed(images, "mixup")):
        fits = []
        for other in images:
            direction = images[i] - other
            share = ((made - other) * direction).sum() / direction.square().sum().clamp_min(1e-9)
            on_the_line = torch.allclose(made, other + share * direction, atol=1e-5)
            fits.append(on_the_line and -1e-4 < share < 1 + 1e-4)
        assert any(fits)


def test_cutmix_takes_a_rectangle_from_one_other_image():
    values = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    images = values.view(5, 1, 1, 1).expand(5, 3, 12, 16).contiguous()
    shares = []
    for i, made in enumerate(changed(images, "cutmix", copies=40)):
        taken = (made[0] - values[i % 5]).abs() > 1e-5
        rows, columns = taken.any(1), taken.any(0)
        assert torch.equal(taken, rows.view(-1, 1) & columns.view(1, -1))
        for side in (rows, columns):
            assert (side.nonzero().diff(dim=0) == 1).all()
        inside = made[:, taken].unique()
        assert len(inside) <= 1
        assert all(torch.isclose(values, value).any() for value in inside)
        shares.append(taken.float().mean())
    assert min(shares) < 0.05
    assert max(shares) > 0.6


@pytest.mark.parametrize("count", [2, 3, 8])
def test_mixup_partners_are_never_the_image_itself(count):
    images = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for seed in range(30):
        assert (changed(images, "mixup", seed=seed) != images).flatten(1).any(1).all()


def test_cutmix_partners_are_never_the_image_itself():
    values = torch.arange(4) / 4
    images = values.view(4, 1, 1, 1).expand(4, 3, 32, 32).contiguous()
    differs = [
        (changed(images, "cutmix", seed=seed) != images).flatten(1).any(1).float() for seed in range(40)
    ]
    # An empty rectangle is the only other way to stay the same: below a share of (2 / 32)^2.
    assert torch.stack(differs).mean() > 0.97


@pytest.mark.parametrize(
    ("settings", "images", "expected"),
    [
        (["augmentation.kind=none"], 32, 0),
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
