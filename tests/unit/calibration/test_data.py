"""Folders are read as they are on disk; calibration sets are balanced, reproducible and hashed."""

import errno
import io
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metaaug_cli.calibration.data import (
    build_calibration_set,
    check_class_count,
    iter_labelled_batches,
    join_calibration_sets,
    load_calibration_set,
    make_calibration_set,
    save_calibration_set,
    scan_folder,
)
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((8, 8), None, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def write_image(path: Path, value=None, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if value is None:
        seed = sum(map(ord, path.name))
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    else:
        pixels = np.full((*size, 3), value, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 6, 4 and 2 images; pixel values tell the class (10, 20, 30) and the image."""
    root = tmp_path / "images"
    for label, (name, count) in enumerate((("cat", 6), ("dog", 4), ("emu", 2))):
        for i in range(count):
            write_image(root / name / f"{i}.png", 10 * (label + 1) + i)
    return root


def pixel_values(images):
    return PREPROCESSING.denormalise(images).mul(255).round()[:, 0, 0, 0].int().tolist()


def test_scan_finds_every_suffix_at_any_depth(tmp_path):
    for name in ("a/x.jpg", "a/deep/er/y.JPEG", "b/z.png", "b/v.bmp", "b/w.webp"):
        write_image(tmp_path / name)
    for name in ("a/notes.txt", "a/.hidden.png", ".git/q.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = scan_folder(tmp_path)
    assert [p.name for p in found.paths] == ["y.JPEG", "x.jpg", "v.bmp", "w.webp", "z.png"]
    assert found.labels == (0, 0, 1, 1, 1)
    assert found.classes == ("a", "b")


def test_pipes_named_like_images_are_no_images(folder):
    before = scan_folder(folder).paths
    os.mkfifo(folder / before[0].parent / "pipe.png")
    assert scan_folder(folder).paths == before


def test_flat_folder_has_no_labels(tmp_path):
    write_image(tmp_path / "a.png")
    found = scan_folder(tmp_path)
    assert found.labels is None
    assert found.classes is None
    check_class_count(found, 1000)


def test_loose_images_beside_folders_drop_the_labels(folder, caplog):
    write_image(folder / "stray.png")
    assert scan_folder(folder).labels is None
    assert "labels ignored" in caplog.text


def test_classes_file_gives_the_index(folder, tmp_path):
    listing = tmp_path / "classes.txt"
    listing.write_text("emu large bird\n\nant small\ndog good\ncat aloof\n")
    found = scan_folder(folder, classes_file=listing)
    assert Counter(found.labels) == {3: 6, 2: 4, 0: 2}
    check_class_count(found, 4)
    with pytest.raises(InputError, match="lists 4 classes, the model has 10"):
        check_class_count(found, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [("cat\ndog\n", "1 class folders are not in .*: emu"), ("cat\ndog\nemu\ncat\n", "cat more than once")],
)
def test_classes_file_must_fit(folder, tmp_path, text, message):
    listing = tmp_path / "classes.txt"
    listing.write_text(text)
    with pytest.raises(InputError, match=message):
        scan_folder(folder, classes_file=listing)
    with pytest.raises(InputError, match="cannot read the classes file"):
        scan_folder(folder, classes_file=tmp_path / "absent.txt")


def test_missing_classes_are_never_silently_mislabelled(folder):
    check_class_count(scan_folder(folder), 3)
    with pytest.raises(InputError, match="3 class folders, the model has 10 outputs") as caught:
        check_class_count(scan_folder(folder), 10)
    assert "--classes" in caught.value.hint


def test_a_single_output_goes_with_two_class_folders(folder):
    with pytest.raises(InputError, match="3 class folders, the model has one output, so two classes"):
        check_class_count(scan_folder(folder), 1)
    shutil.rmtree(folder / "emu")
    check_class_count(scan_folder(folder), 1)


def test_a_classes_file_may_begin_with_a_byte_order_mark(folder, tmp_path):
    listing = tmp_path / "classes.txt"
    listing.write_text("emu\ndog\ncat\n", encoding="utf-8-sig")
    assert scan_folder(folder, classes_file=listing).classes == ("emu", "dog", "cat")


@pytest.fixture
def locked(monkeypatch):
    """Take the right to list some folders away; root has it everywhere."""
    names, scandir = set(), os.scandir

    def refuse(path):
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return names


def test_folders_that_cannot_be_read_are_named(folder, tmp_path, locked):
    locked.add("dog")
    said = "dog: cannot read the folder, Permission denied"
    listing = tmp_path / "classes.txt"
    listing.write_text("cat\ndog\nemu\n")
    found = scan_folder(folder, classes_file=listing)
    assert len(found.paths) == 8
    assert build_calibration_set(found, PREPROCESSING).skipped == (said,)
    skipped = []
    assert sum(len(x) for x, _ in iter_labelled_batches(found, PREPROCESSING, skipped=skipped)) == 8
    assert skipped == [said]
    with pytest.raises(InputError, match=r"2 class folders with images \(dog without any that can be read\)"):
        check_class_count(scan_folder(folder), 3)


def test_a_folder_of_which_nothing_can_be_read(folder, locked):
    locked.update({"cat", "dog", "emu"})
    with pytest.raises(InputError, match=r"no images in .* can be read: cat: cannot read the folder"):
        scan_folder(folder)


def test_numbered_folders_of_unclear_order_need_a_list(tmp_path):
    for i in range(11):
        write_image(tmp_path / "unclear" / str(i) / "a.png")
        write_image(tmp_path / "padded" / f"{i:02d}" / "a.png")
    check_class_count(scan_folder(tmp_path / "padded"), 11)
    with pytest.raises(InputError, match="ambiguous"):
        check_class_count(scan_folder(tmp_path / "unclear"), 11)


def test_no_folder_no_images(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        scan_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in"):
        scan_folder(tmp_path / "empty")
    write_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a file"):
        scan_folder(tmp_path / "a.png")


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


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_batches_hold_every_image_once_in_order(folder, batch_size):
    (folder / "dog" / "1.png").write_bytes(b"broken")
    skipped, seen = [], []
    batches = list(
        iter_labelled_batches(
            scan_folder(folder),
            PREPROCESSING,
            batch_size=batch_size,
            skipped=skipped,
            progress=lambda *state: seen.append(state),
        )
    )
    assert all(len(images) <= batch_size for images, _ in batches)
    assert pixel_values(torch.cat([images for images, _ in batches])) == [
        *range(10, 16), 20, 22, 23, 30, 31,
    ]  # fmt: skip
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 6 + [1] * 3 + [2] * 2
    assert [entry.split(":")[0] for entry in skipped] == ["dog/1.png"]
    assert seen[-1] == (12, 12)


def test_a_broken_last_file_does_not_lose_the_batch_before_it(folder):
    (folder / "emu" / "1.png").write_bytes(b"broken")
    sizes = [
        len(images) for images, _ in iter_labelled_batches(scan_folder(folder), PREPROCESSING, batch_size=8)
    ]
    assert sizes == [8, 3]


def test_batches_of_chosen_indices(folder):
    batches = iter_labelled_batches(scan_folder(folder), PREPROCESSING, indices=[11, 0, 6])
    images, labels = next(iter(batches))
    assert pixel_values(images) == [31, 10, 20]
    assert labels.tolist() == [2, 0, 1]


def test_batches_of_a_flat_folder_have_no_labels(folder):
    assert next(iter_labelled_batches(scan_folder(folder / "cat"), PREPROCESSING))[1] is None


def test_real_folders(shared):
    classes = shared / "data/imagenet/classes.txt"
    found = scan_folder(shared / "data/imagenet/val", classes_file=classes)
    check_class_count(found, 1000)
    assert len(found.paths) == 650
    names = classes.read_text().split()
    assert all(
        names[label] == path.parent.name for label, path in zip(found.labels, found.paths, strict=True)
    )
    with pytest.raises(InputError, match="the model has 1000 outputs"):
        check_class_count(scan_folder(shared / "data/imagenet/val"), 1000)
