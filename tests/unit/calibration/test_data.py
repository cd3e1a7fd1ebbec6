"""Calibration sets are balanced, reproducible and hashed."""

import io
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_folders import PREPROCESSING, pixel_values, write_image
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metaaug_cli.calibration.data import (
    build_calibration_set,
    iter_labelled_batches,
    join_calibration_sets,
    load_calibration_set,
    make_calibration_set,
    save_calibration_set,
    scan_folder,
)
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.preprocessing import Preprocessing


@pytest.mark.parametrize("num", [3, 6, 9])
def test_drawn_images_are_balanced(folder, num):
    chosen = build_calibration_set(scan_folder(folder), PREPROCESSING, num=num)
    counts = Counter(source.split("/")[0] for source in chosen.sources)
    assert sum(counts.values()) == num
    assert counts["emu"] == min(num // 3, 2)
    assert abs(counts["cat"] - counts["dog"]) <= 1


def test_images_belong_to_their_sources_and_the_seed_decides(folder):
    scanned = scan_folder(folder)
    chosen = build_calibration_set(scanned, PREPROCESSING, num=7, seed=1)
    base = {"cat": 10, "dog": 20, "emu": 30}
    expected = [base[s.split("/")[0]] + int(s.split("/")[1][0]) for s in chosen.sources]
    assert pixel_values(chosen.images) == expected
    again = build_calibration_set(scanned, PREPROCESSING, num=7, seed=1)
    other = build_calibration_set(scanned, PREPROCESSING, num=7, seed=2)
    assert (again.sha256, again.sources) == (chosen.sha256, chosen.sources)
    assert other.sources != chosen.sources
    assert other.sha256 != chosen.sha256


def test_unreadable_files_are_replaced_counted_and_named(folder):
    (folder / "cat" / "broken.jpg").write_bytes(b"not an image")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    (folder / "cat" / "short.jpg").write_bytes(buffer.getvalue()[:1500])
    (folder / "dog" / "empty.png").write_bytes(b"")
    write_image(folder / "emu" / "small.png", size=(5, 5))
    seen = []
    chosen = build_calibration_set(
        scan_folder(folder), PREPROCESSING, num=100, progress=lambda *state: seen.append(state)
    )
    assert len(chosen.images) == len(chosen.sources) == 12
    reasons = dict(entry.split(": ", 1) for entry in chosen.skipped)
    assert set(reasons) == {"cat/broken.jpg", "cat/short.jpg", "dog/empty.png", "emu/small.png"}
    assert "truncated" in reasons["cat/short.jpg"]
    assert "smaller than the 8x8 crop" in reasons["emu/small.png"]
    assert str(folder) not in str(chosen.skipped)
    assert seen[-1] == (12, 16)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not one of 1 images .* can be used: a\.png"):
        build_calibration_set(scan_folder(tmp_path), PREPROCESSING)
    with pytest.raises(InputError, match="can be used"):
        list(iter_labelled_batches(scan_folder(tmp_path), PREPROCESSING))
    with pytest.raises(UsageError, match="at least 1"):
        build_calibration_set(scan_folder(tmp_path), PREPROCESSING, num=0)


def test_stored_set_reads_back_bit_for_bit(folder, tmp_path):
    chosen = build_calibration_set(scan_folder(folder), PREPROCESSING, num=9)
    first, second = tmp_path / "one.safetensors", tmp_path / "deeper" / "two.safetensors"
    save_calibration_set(chosen, first)
    save_calibration_set(chosen, second)
    assert first.read_bytes() == second.read_bytes()
    assert load_file(first)["pixels"].dtype == torch.uint8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deeper", "images", "one.safetensors"]
    back = load_calibration_set(first, preprocessing=PREPROCESSING)
    assert torch.equal(back.images, chosen.images)
    assert (back.sources, back.skipped, back.sha256) == (chosen.sources, chosen.skipped, chosen.sha256)
    assert (back.origin, back.preprocessing) == ("folder images", PREPROCESSING)


def test_images_off_the_pixel_grid_are_stored_as_floats(tmp_path):
    images = torch.randn(5, 3, 8, 8)
    save_calibration_set(
        make_calibration_set(images, PREPROCESSING, list("abcde")), tmp_path / "s.safetensors"
    )
    assert torch.equal(load_calibration_set(tmp_path / "s.safetensors").images, images)


def test_a_prefix_of_a_stored_set_is_a_set_of_its_own(folder, tmp_path):
    path = tmp_path / "set.safetensors"
    save_calibration_set(build_calibration_set(scan_folder(folder), PREPROCESSING, num=9), path)
    part = load_calibration_set(path, num=3)
    direct = load_calibration_set(folder, preprocessing=PREPROCESSING, num=3)
    assert (part.sha256, part.sources) == (direct.sha256, direct.sources)


def test_a_stored_set_may_be_read_by_those_who_may_read_other_files(tmp_path):
    images = PREPROCESSING.normalise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    save_calibration_set(make_calibration_set(images, PREPROCESSING, ["a"]), tmp_path / "set.safetensors")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "set.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_prefix_keeps_the_notes_that_concern_it(tmp_path):
    images = PREPROCESSING.normalise(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    whole = make_calibration_set(images, PREPROCESSING, ["a", "ab", "c"])
    noted = replace(whole, duplicates=("d: duplicate of a",), outliers=("a: dark", "ab: light"))
    save_calibration_set(noted, tmp_path / "set.safetensors")
    part = load_calibration_set(tmp_path / "set.safetensors", num=1)
    assert (part.duplicates, part.outliers) == (("d: duplicate of a",), ("a: dark",))


PIXELS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"pixels": PIXELS[:, :2].contiguous()}, {}, "not a readable"),
        ({"pixels": PIXELS[:, :, 0, 0].contiguous()}, {}, "not a readable"),
        ({"images": torch.zeros(2, 4, 8, 8)}, {}, "do not fit together"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}, {}, "do not fit together"),
        ({"pixels": PIXELS}, {"sources": [1, 2]}, "do not fit together"),
        ({"pixels": PIXELS}, {"sources": ["a"]}, "hash does not match"),
        ({"pixels": PIXELS}, {"duplicates": None}, "not a readable"),
    ],
)
def test_entries_that_do_not_fit_together_are_refused(tmp_path, tensors, changes, message):
    path = tmp_path / "set.safetensors"
    save_calibration_set(
        make_calibration_set(PREPROCESSING.normalise(PIXELS), PREPROCESSING, ["a", "b"]), path
    )
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["metaaug"]) | changes
    save_file(tensors, path, {"metaaug": json.dumps(meta)})
    with pytest.raises(InputError, match=message):
        load_calibration_set(path)


@pytest.mark.parametrize(("count", "value", "message"), [(0, 0.0, "no images"), (2, math.nan, "NaN")])
def test_sets_that_nothing_can_be_learned_from_are_refused(tmp_path, count, value, message):
    images = torch.full((count, 3, 8, 8), value)
    path = tmp_path / "set.safetensors"
    save_calibration_set(make_calibration_set(images, PREPROCESSING, ["a", "b"][:count]), path)
    with pytest.raises(InputError, match=message):
        load_calibration_set(path)


def test_a_set_for_another_preprocessing_is_refused(folder, tmp_path):
    path = tmp_path / "set.safetensors"
    save_calibration_set(build_calibration_set(scan_folder(folder), PREPROCESSING), path)
    other = Preprocessing((8, 8), None, "bilinear", (0.5, 0.5, 0.5), PREPROCESSING.std)
    with pytest.raises(InputError, match=r"mean: 0\.5 0\.4 0\.3, not 0\.5 0\.5 0\.5"):
        load_calibration_set(path, preprocessing=other)


def test_joined_sets_keep_their_order_notes_and_bits(folder, tmp_path):
    (folder / "cat" / "0.png").write_bytes(b"no image")
    first = build_calibration_set(scan_folder(folder), PREPROCESSING, num=4, seed=1)
    second = build_calibration_set(scan_folder(folder), PREPROCESSING, num=3, seed=2)
    joined = join_calibration_sets(first, second)
    assert joined.images.equal(torch.cat([first.images, second.images]))
    assert joined.sources == first.sources + second.sources
    assert joined.skipped == first.skipped + second.skipped
    assert len({joined.sha256, first.sha256, second.sha256}) == 3
    save_calibration_set(joined, tmp_path / "joined.safetensors")
    assert load_calibration_set(tmp_path / "joined.safetensors").sha256 == joined.sha256
    other = make_calibration_set(second.images, replace(PREPROCESSING, mean=(0.5, 0.5, 0.5)), second.sources)
    with pytest.raises(InputError, match="mean"):
        join_calibration_sets(first, other)


def test_a_changed_or_foreign_file_is_refused(folder, tmp_path):
    path = tmp_path / "set.safetensors"
    save_calibration_set(build_calibration_set(scan_folder(folder), PREPROCESSING), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="hash does not match"):
        load_calibration_set(path)
    path.write_bytes(b"garbage")
    with pytest.raises(InputError, match="not a readable calibration set"):
        load_calibration_set(path)
    save_file({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="is not a calibration set"):
        load_calibration_set(path)
    with pytest.raises(InputError, match="does not exist"):
        load_calibration_set(tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match="is a folder"):
        load_calibration_set(folder)
