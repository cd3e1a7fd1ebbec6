"""Sets as PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_cli.calibration.data import make_calibration_set
from metaaug_cli.calibration.png_folder import require_empty, write_pngs
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.preprocessing import Preprocessing


@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_the_pixels(tmp_path, channels):
    preprocessing = Preprocessing((6, 8), None, "bilinear", (0.3,) * channels, (0.2,) * channels)
    pixels = torch.randint(0, 256, (2, channels, 6, 8), dtype=torch.uint8)
    write_pngs(
        make_calibration_set(preprocessing.normalise(pixels), preprocessing, ["a", "b"]), tmp_path / "new"
    )
    for name, image in zip("ab", pixels, strict=True):
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            read = np.array(picture).reshape(6, 8, channels)
        assert np.array_equal(read, image.permute(1, 2, 0).numpy())


def test_a_folder_of_ones_own_images_is_not_written_into(tmp_path):
    require_empty(tmp_path)
    require_empty(tmp_path / "new")
    (tmp_path / "mine.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="not an empty folder"):
        require_empty(tmp_path)
    with pytest.raises(UsageError):
        require_empty(tmp_path / "mine.jpg")
    with pytest.raises(InputError, match="is not a folder"):
        require_empty(tmp_path / "mine.jpg" / "below")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    preprocessing = Preprocessing((2, 2), None, "bilinear", (0.5,), (0.5,))
    made = make_calibration_set(torch.zeros(1, 1, 2, 2), preprocessing, ["a"])
    with pytest.raises(InputError, match="file"):
        write_pngs(made, tmp_path / "file" / "folder")
