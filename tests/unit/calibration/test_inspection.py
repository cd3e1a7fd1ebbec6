"""Statistics and pictures of a calibration set say what is in it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_cli.calibration.data import make_calibration_set
from metaaug_cli.calibration.inspection import (
    BINS,
    channel_statistics,
    class_counts,
    contact_sheet,
    page,
    summary,
    write_contact_sheet,
    write_page,
)
from metaaug_cli.calibration.png_folder import to_picture
from metaaug_cli.errors import InputError
from metaaug_cli.networks.preprocessing import Preprocessing

RGB = Preprocessing((4, 4), None, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocessing((4, 6), None, "bilinear", (0.5,), (0.25,))


def calibration(num=12, preprocessing=RGB, seed=0, **changes):
    shape = (num, preprocessing.channels, *preprocessing.size)
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    sources = changes.pop("sources", [f"c{i % 3}/{i}.png" for i in range(num)])
    return pixels, make_calibration_set(preprocessing.normalise(pixels), preprocessing, sources, **changes)


def test_statistics_equal_numpy_on_the_pixels():
    pixels, chosen = calibration(num=150)
    for channel, found in enumerate(channel_statistics(chosen)):
        values = pixels[:, channel].double().numpy()
        assert found.name == ("red", "green", "blue")[channel]
        assert found.mean == pytest.approx(values.mean(), abs=1e-3)
        assert found.std == pytest.approx(values.std(), abs=1e-3)
        assert (round(found.low), round(found.high)) == (values.min(), values.max())
        assert found.black == pytest.approx((values == 0).mean())
        assert found.white == pytest.approx((values == 255).mean())
        normalised = chosen.images[:, channel]
        assert found.normalised_mean == pytest.approx(normalised.mean().item(), abs=1e-4)
        assert found.normalised_std == pytest.approx(normalised.std(correction=0).item(), abs=1e-4)
        assert list(found.histogram) == np.histogram(values, bins=BINS, range=(0, 256))[0].tolist()


def test_every_pixel_value_lands_in_its_own_bin():
    """Normalising and back leaves 51.9999 for 52, which must not count as 51."""
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4).expand(16, 3, 4, 4)
    chosen = make_calibration_set(RGB.normalise(pixels), RGB, [str(i) for i in range(16)])
    assert all(set(found.histogram) == {256 // BINS} for found in channel_statistics(chosen))


def test_values_outside_the_pixel_range_show():
    images = RGB.normalise(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    images[0, 0] = 10.0
    found = channel_statistics(make_calibration_set(images, RGB, ["a", "b"]))
    assert found[0].high == pytest.approx((10 * 0.229 + 0.485) * 255, rel=1e-5)
    assert found[0].white == found[0].black == 0.5
    assert sum(found[0].histogram) == 32


def test_class_counts_need_class_folders():
    assert class_counts(calibration(num=7)[1]) == {"c0": 3, "c1": 2, "c2": 2}
    assert class_counts(calibration(num=2, sources=["a.png", "b/c.png"])[1]) == {}


@pytest.mark.parametrize("preprocessing", [RGB, GREY])
def test_pictures_are_the_pixels(preprocessing):
    pixels, chosen = calibration(preprocessing=preprocessing)
    picture = torch.from_numpy(np.array(to_picture(chosen, 3)))
    expected = pixels[3].permute(1, 2, 0).squeeze(-1)
    assert torch.equal(picture, expected)


def test_sheet_shows_each_image_in_its_place():
    pixels, chosen = calibration(num=12)
    sheet = np.array(contact_sheet(chosen))
    assert sheet.shape == (2 * 100 + 4, 10 * 100 + 4, 3)
    for index in (0, 9, 10, 11):
        row, column = divmod(index, 10)
        tile = sheet[4 + row * 100 : 100 + row * 100, 4 + column * 100 : 100 + column * 100]
        # One sample per enlarged pixel gives the image back.
        assert (tile[12::24, 12::24] == pixels[index].permute(1, 2, 0).numpy()).all()
    assert (sheet[150, 250:] == sheet[0, 0]).all()


def test_sheet_of_a_large_set_spreads_over_it():
    pixels = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1).expand(200, 3, 4, 4)
    chosen = make_calibration_set(RGB.normalise(pixels), RGB, [str(i) for i in range(200)])
    sheet = np.array(contact_sheet(chosen))
    centres = sheet[52::100, 52::100, 0].flatten().tolist()
    assert centres == list(range(0, 200, 2))


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in {"src", "href"}]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in {"src", "href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_outside_itself():
    _, chosen = calibration(skipped=["<b>x</b>.png: broken"], origin="folder a & b")
    text = page(chosen, channel_statistics(chosen), title="<set>")
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(tags.links) == 1
    sheet = Image.open(io.BytesIO(base64.b64decode(tags.links[0].removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.array(sheet), np.array(contact_sheet(chosen)))
    assert "<h1>&lt;set&gt;</h1>" in text
    assert "&lt;b&gt;x&lt;/b&gt;.png: broken" in text
    assert "12 from folder a &amp; b" in text
    assert re.search(r"<tr><th>green</th><td>\d+\.\d</td>", text)
    assert text.count("<polyline") == 3
    assert "$" not in text


def test_grey_set_has_one_channel_on_the_page():
    chosen = calibration(preprocessing=GREY)[1]
    text = page(chosen, channel_statistics(chosen), title="digits")
    assert text.count("<polyline") == 1
    assert "<th>grey</th>" in text


def test_files_are_written_whole(tmp_path):
    _, chosen = calibration()
    write_contact_sheet(chosen, tmp_path / "new" / "sheet.png")
    write_page(chosen, channel_statistics(chosen), tmp_path / "set.html", title="set")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (1004, 204)
    assert (tmp_path / "set.html").read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set.html"]
    with pytest.raises(InputError, match="cannot write"):
        write_page(chosen, channel_statistics(chosen), tmp_path / "set.html" / "inside.html", title="set")


def test_summary_is_plain_and_complete():
    _, chosen = calibration(num=6)
    found = summary(chosen, channel_statistics(chosen))
    assert found["num"] == 6
    assert found["classes"] == {"c0": 2, "c1": 2, "c2": 2}
    assert found["sha256"] == chosen.sha256
    assert [channel["name"] for channel in found["channels"]] == ["red", "green", "blue"]
