"""Images that stand out are named with the reason; ordinary ones are not."""

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_cli.calibration.data import (
    build_calibration_set,
    load_calibration_set,
    save_calibration_set,
    scan_folder,
)
from metaaug_cli.calibration.outliers import LIMIT, colourfulness, find_outliers, modified_z
from metaaug_cli.networks.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((8, 8), "auto", "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def ordinary(count=20):
    return torch.rand(count, 3, 8, 8) * 0.6 + 0.2


def notes(pixels):
    images = (pixels - torch.tensor(PREPROCESSING.mean).view(3, 1, 1)) / torch.tensor(PREPROCESSING.std).view(
        3, 1, 1
    )
    found = find_outliers(images, PREPROCESSING, [str(i) for i in range(len(pixels))])
    return dict(entry.split(": ", 1) for entry in found)


def test_modified_z_is_the_published_formula():
    values = np.array([2.0, 3.0, 5.0, 8.0, 90.0])
    median = np.median(values)
    expected = 0.6745 * (values - median) / np.median(np.abs(values - median))
    assert modified_z(torch.from_numpy(values)).numpy() == pytest.approx(expected)
    # Many extreme images cannot hide each other, as they can from mean and standard deviation.
    crowd = torch.cat([torch.arange(12.0), torch.full((5,), 200.0)])
    assert (modified_z(crowd)[-5:] > LIMIT).all()


def test_equal_values_have_no_outliers():
    assert modified_z(torch.ones(9)).tolist() == [0.0] * 9


def test_ordinary_images_do_not_stand_out():
    assert notes(ordinary()) == {}


def test_each_kind_is_named():
    pixels = ordinary()
    pixels[3] = 0.02
    pixels[5] = pixels[5].mean(0)
    pixels[7, 0], pixels[7, 2] = 0.9, 0.1
    pixels[9] = (torch.arange(8) % 2).float()
    found = notes(pixels)
    assert set(found) == {"3", "5", "7", "9"}
    assert "brightness 5, the set's median is" in found["3"]
    assert found["5"] == "no colour"
    assert "red minus blue 204" in found["7"]
    assert "contrast 128" in found["9"]


def test_a_grey_set_is_not_a_list_of_outliers():
    assert notes(ordinary().mean(1, keepdim=True).expand(-1, 3, -1, -1)) == {}
    assert colourfulness(torch.rand(4, 1, 8, 8).expand(-1, 3, -1, -1)).tolist() == [0.0] * 4


def test_a_handful_of_images_says_nothing():
    pixels = ordinary(4)
    pixels[0] = 0
    assert notes(pixels) == {}


def test_sizes_come_from_the_files_and_survive_storing(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(12):
        shape = {4: (400, 400, 3), 6: (17, 68, 3)}.get(index, (30 + index, 32, 3))
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    built = build_calibration_set(scan_folder(tmp_path), PREPROCESSING)
    sizes = {entry.split(": ")[0]: entry for entry in built.outliers if "pixels" in entry}
    assert set(sizes) == {"4.png", "6.png"}
    assert "400x400 pixels, the set's median is" in sizes["4.png"]
    assert "68x17 pixels, unusually long" in sizes["6.png"]
    save_calibration_set(built, tmp_path / "set.safetensors")
    assert load_calibration_set(tmp_path / "set.safetensors").outliers == built.outliers
