"""An image folder that several tests read."""

import pytest
from image_folders import write_image


@pytest.fixture
def folder(tmp_path):
    """Three classes of 6, 4 and 2 images; pixel values tell the class (10, 20, 30) and the image."""
    root = tmp_path / "images"
    for label, (name, count) in enumerate((("cat", 6), ("dog", 4), ("emu", 2))):
        for i in range(count):
            write_image(root / name / f"{i}.png", 10 * (label + 1) + i)
    return root
