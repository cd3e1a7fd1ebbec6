"""Copies are recognised through the changes that copying makes; different pictures are not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from metaaug_cli.calibration.duplicates import MIN_SIDE, DuplicateFinder, fingerprint

SIDE = 48


def picture(seed, side=SIDE):
    """A smooth random picture, as photographs are and noise is not."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def pixels(image):
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


COPIES = {
    "jpeg": lambda i: jpeg(i, 60),
    "half": lambda i: i.resize((SIDE // 2, SIDE // 2)).resize((SIDE, SIDE)),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.15),
    "flatter": lambda i: ImageEnhance.Contrast(i).enhance(0.7),
}


@pytest.mark.parametrize("change", COPIES)
def test_changed_copies_are_near_duplicates(change):
    finder = DuplicateFinder()
    for seed in range(20):
        assert finder.add(f"{seed}.png", pixels(picture(seed))) is None
    for seed in range(20):
        copy = pixels(COPIES[change](picture(seed)))
        assert finder.add("copy.png", copy) == f"near-duplicate of {seed}.png"


def test_equal_pixels_are_duplicates_at_any_size():
    for side in (4, SIDE):
        finder = DuplicateFinder()
        assert finder.add("a", pixels(picture(0, side))) is None
        assert finder.add("b", pixels(picture(0, side))) == "duplicate of a"


def test_different_pictures_mirrors_and_other_colours_are_not():
    finder = DuplicateFinder()
    original = pixels(picture(0))
    assert finder.add("original", original) is None
    assert finder.add("mirrored", original.flip(2)) is None
    assert finder.add("other colours", original[[1, 2, 0]]) is None
    assert finder.add("negative", 1 - original) is None


def test_plain_and_small_pictures_count_only_when_equal():
    finder = DuplicateFinder()
    for level in (0.1, 0.11, 0.5):
        assert finder.add(f"plain {level}", torch.full((3, SIDE, SIDE), level)) is None
    small = pixels(picture(0, MIN_SIDE - 1))
    assert finder.add("small", small) is None
    assert finder.add("brighter", (small + 2 / 255).clamp(0, 1)) is None


def test_hash_is_the_sign_of_low_cosine_coefficients():
    """Against SciPy's transform, on a picture that is already 32x32."""
    fft = pytest.importorskip("scipy.fft")
    image = pixels(picture(3, 32))
    coefficients = fft.dctn(image.mean(0).double().numpy(), norm="ortho")
    # SciPy scales the first row and column by 1/sqrt(2) more than a plain sum of cosines.
    coefficients[0] *= 2**0.5
    coefficients[:, 0] *= 2**0.5
    low = coefficients[:8, :8].ravel()[1:]
    assert np.array_equal(fingerprint(image).bits > 0, low > np.median(low))


def test_the_real_sets_hold_few_copies(shared):
    """CIFAR-10 is known to hold a few (Barz and Denzler 2020); the ImageNet images are all different."""
    for name, most in (("cifar10", 5), ("imagenet", 0)):
        finder = DuplicateFinder()
        files = sorted((shared / "data" / name / "calib").rglob("*.jpg"))[:400]
        if not files:
            files = [p for p in sorted((shared / "data" / name / "calib").rglob("*")) if p.is_file()][:400]
        found = []
        for path in files:
            with Image.open(path) as image:
                found.append(finder.add(path.name, pixels(image.resize((64, 64)))))
        assert sum(entry is not None for entry in found) <= most
