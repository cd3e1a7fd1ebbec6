"""Folders are read as they are on disk: images, classes, and batches in order."""

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from image_folders import PREPROCESSING, pixel_values, write_image

from metaaug_cli.calibration.data import (
    build_calibration_set,
    check_class_count,
    iter_labelled_batches,
    scan_folder,
)
from metaaug_cli.errors import InputError


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
