"""``metaaug calibrate``: both spellings, the files it writes, and what it says when it cannot."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from metaaug_cli.calibration.data import load_calibration_set
from metaaug_cli.cli.app import main

NETWORK = """
from torch import nn

def build():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The model's and the folder's arguments, run from a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "imgs" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(10 * label + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "imgs" / name / f"{i}.png")
    model = ["net.py:build", "--weights", "random", "--size", "16", "--mean", ".5,.5,.5", "--std", ".2,.2,.2"]
    return [*model, "--images", "imgs"]


@pytest.mark.parametrize("command", [["calibrate"], ["calibrate", "build"]])
def test_builds_a_set(arguments, tmp_path, capsys, command):
    assert main([*command, *arguments, "--out", "calib.safetensors", "--num", "6"]) == 0
    output = capsys.readouterr()
    assert "6 images written to calib.safetensors" in output.out
    assert "16x16 RGB centre crop" in output.err
    stored = load_calibration_set(tmp_path / "calib.safetensors")
    assert stored.images.shape == (6, 3, 16, 16)
    assert sorted(s.split("/")[0] for s in stored.sources) == ["cat"] * 3 + ["dog"] * 3


def test_options_may_come_before_the_model(arguments, tmp_path):
    assert main(["calibrate", "--out", "c.safetensors", "-q", *arguments]) == 0
    assert len(load_calibration_set(tmp_path / "c.safetensors").images) == 8


def test_the_seed_decides(arguments, tmp_path):
    hashes = []
    for seed in ("0", "0", "5"):
        assert main(["calibrate", *arguments, "-o", "c.safetensors", "--num", "3", "--seed", seed, "-q"]) == 0
        hashes.append(load_calibration_set(tmp_path / "c.safetensors").sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_copies_are_replaced_and_named_unless_they_are_wanted(arguments, tmp_path, capsys):
    for i in range(1, 4):
        (tmp_path / "imgs" / "cat" / f"{i}.png").write_bytes((tmp_path / "imgs/cat/0.png").read_bytes())
    assert main(["calibrate", *arguments, "--out", "c.safetensors", "--num", "5", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["num"] == 5
    assert sum("duplicate of cat/" in entry for entry in report["duplicates"]) >= 1
    assert f"{len(report['duplicates'])} copies left out:" in output.err
    assert main(["calibrate", "-q", *arguments, "--out", "c.safetensors", "--keep-duplicates"]) == 0
    kept = load_calibration_set(tmp_path / "c.safetensors")
    assert len(kept.images) == 8
    assert kept.duplicates == ()


def test_build_reports_as_json(arguments, tmp_path, capsys):
    (tmp_path / "imgs" / "cat" / "broken.jpg").write_bytes(b"x")
    assert main(["calibrate", *arguments, "--out", "c.safetensors", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["num"] == 8
    assert report["num_classes"] == 2
    assert report["sha256"] == load_calibration_set(tmp_path / "c.safetensors").sha256
    assert report["preprocessing"]["size"] == [16, 16]
    assert "cat/broken.jpg" in report["skipped"][0]
    assert "warning: 1 files skipped" in output.err
    assert "cat/broken.jpg" in output.err


def test_inspect_shows_statistics_and_writes_the_page(arguments, tmp_path, capsys):
    assert main(["calibrate", *arguments, "--out", "c.safetensors", "-q"]) == 0
    capsys.readouterr()
    assert main(["calibrate", "inspect", "c.safetensors"]) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines())
    assert "c.safetensors: 8 images, 2 classes, folder imgs" in output
    mean = torch.from_numpy(
        np.stack([np.array(Image.open(p).copy()) for p in sorted((tmp_path / "imgs").rglob("*.png"))])
    )[..., 1].double()
    green = next(line.split() for line in output.splitlines() if line.startswith("green"))
    assert green[1] == f"{mean.mean():.1f}"
    page = (tmp_path / "c.html").read_text()
    assert "<h1>c.safetensors</h1>" in page
    assert "data:image/png;base64," in page


def test_inspect_writes_only_what_is_named(arguments, tmp_path, capsys):
    assert main(["calibrate", *arguments, "--out", "c.safetensors", "-q"]) == 0
    capsys.readouterr()
    assert main(["calibrate", "inspect", "c.safetensors", "--png", "sheet.png", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"] == {"cat": 4, "dog": 4}
    assert [channel["name"] for channel in report["channels"]] == ["red", "green", "blue"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 100 + 4
    assert not (tmp_path / "c.html").exists()


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (["--out", "c.pt"], "--out c.pt must end in .safetensors", "--out c.safetensors"),
        (["--images", "absent"], "absent does not exist", "folder of images"),
        (["--mean", "a,b"], "--mean a,b", "commas"),
        (["--resize", "8"], "smaller than the 16x16 crop", "--resize"),
        (["--weights", "none.pt"], "no weights file at none.pt", "--weights"),
    ],
)
def test_mistakes_exit_with_2_and_a_hint(arguments, tmp_path, capsys, changes, message, hint):
    assert main(["calibrate", *arguments, "--out", "c.safetensors", *changes]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert f"hint: {hint}" in error or hint in error.split("hint:")[1]
    assert "Traceback" not in error
    assert not (tmp_path / "c.safetensors").exists()


def test_a_full_disk_is_named_and_not_called_a_mistake(arguments, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("metaaug_cli.calibration.data.save_file", full)
    assert main(["calibrate", *arguments, "--out", "c.safetensors"]) == 3
    err = capsys.readouterr().err
    assert "error: the disk is full: c.safetensors" in err
    assert "free some space" in err
    assert "traceback" not in err
    assert not (tmp_path / "c.safetensors").exists()


def test_inspect_of_something_else_exits_with_2(arguments, capsys):
    assert main(["calibrate", "inspect", "net.py"]) == 2
    assert "net.py is not a calibration set" in capsys.readouterr().err
    assert main(["calibrate", "inspect", "absent.safetensors"]) == 2
    assert main(["calibrate", "inspect", "absent.safetensors", "--html", "page.txt"]) == 2
    assert "--html page.html" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["build"], ["inspect"]])
def test_help_fits_80_columns(command, capsys):
    assert main(["calibrate", *command, "--help"]) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines())
    assert "inspect" in output or command == ["build"]
