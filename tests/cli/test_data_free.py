"""``metaaug calibrate --data-free``: the files it writes, what quantize makes of them, and bad usage."""

import json

import pytest
from interruptions import interrupt_synthesis
from PIL import Image

from metaaug_cli.calibration.data import load_calibration_set
from metaaug_cli.cli.app import main
from metaaug_cli.cli.data_free import state_path
from metaaug_cli.errors import InputError

NETWORK = """
from torch import nn

def build():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def plain():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)
"""
PREPARED = ["--weights", "random", "--size", "16", "--mean", ".5,.5,.5", "--std", ".2,.2,.2"]
FAST = ["--iterations", "3", "--batch", "4"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)


def calibrate(*arguments, factory="build"):
    return main(
        ["calibrate", f"net.py:{factory}", *PREPARED, "--data-free", "--out", "s.safetensors", *arguments]
    )


def test_a_set_without_images_quantizes_a_network(tmp_path, capsys):
    assert calibrate(*FAST, "--num", "6", "--images", "sheet", "--json") == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    stored = load_calibration_set(tmp_path / "s.safetensors")
    assert report["num"] == len(stored.images) == 6
    assert report["sha256"] == stored.sha256
    assert "6 images, 3 steps each on " in output.err
    assert "BN loss" in output.err
    pictures = sorted((tmp_path / "sheet").iterdir())
    assert len(pictures) == 6
    with Image.open(pictures[0]) as picture:
        assert picture.size == (16, 16)
    assert not state_path(tmp_path / "s.safetensors").exists()
    run = [
        "quantize",
        "net.py:build",
        *PREPARED,
        "--calib",
        "s.safetensors",
        "--method",
        "nearest",
        "--out",
        "run",
    ]
    assert main(run) == 0
    assert "6 images, data-free from net.build, seed 0" in capsys.readouterr().err


def test_real_images_come_first_and_made_ones_beside_them(tmp_path, capsys):
    for number, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "few").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "few" / f"{number}.png")
    assert calibrate(*FAST, "--num", "4", "--beside", "few", "--images", "sheet") == 0
    assert "3 real images from folder few" in capsys.readouterr().err
    stored = load_calibration_set(tmp_path / "s.safetensors")
    assert set(stored.sources[:3]) == {"0.png", "1.png", "2.png"}
    assert len(stored.images) == 7
    real = load_calibration_set(tmp_path / "few", preprocessing=stored.preprocessing)
    assert stored.images[:3].equal(real.images)
    assert len(list((tmp_path / "sheet").iterdir())) == 4

    low = ["quantize", "net.py:build", *PREPARED, "--wbits", "2", "--plan"]
    assert main([*low, "--calib", "s.safetensors"]) == 0
    assert "are few" not in capsys.readouterr().err
    assert main([*low, "--calib", "few"]) == 0
    assert "3 are few" in capsys.readouterr().err

    assert calibrate(*FAST, "--num", "4", "-q") == 0
    alone = load_calibration_set(tmp_path / "s.safetensors")
    assert stored.images[3:].equal(alone.images)


def test_real_images_that_do_not_fit_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    assert calibrate(*FAST, "--num", "2", "-q") == 0
    (tmp_path / "s.safetensors").rename(tmp_path / "other.safetensors")
    monkeypatch.setattr("metaaug_cli.synthesis.dgh._Synthesis", None)
    assert calibrate(*FAST, "--beside", "nowhere") == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert calibrate(*FAST, "--beside", "other.safetensors", "--size", "24") == 2
    assert "another preprocessing" in capsys.readouterr().err


def test_ctrl_c_says_how_to_continue(tmp_path, capsys, monkeypatch):
    assert calibrate(*FAST, "--num", "6", "-q") == 0
    wanted = load_calibration_set(tmp_path / "s.safetensors").sha256
    with monkeypatch.context() as patch:
        interrupt_synthesis(patch, at=4)
        assert calibrate(*FAST, "--num", "6") == 130
    assert "--resume" in capsys.readouterr().err
    assert calibrate(*FAST, "--num", "6") == 2
    assert "unfinished" in capsys.readouterr().err
    assert calibrate(*FAST, "--num", "6", "--resume") == 0
    assert load_calibration_set(tmp_path / "s.safetensors").sha256 == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stretch", "wide"], "--stretch wide"),
        (["--start", "wide"], "--start wide"),
        (["--device", "tpu"], "--device tpu"),
        (["--images", "."], "not an empty folder"),
        (["--resume"], "to resume"),
        (["--keep-duplicates"], "--keep-duplicates"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    assert calibrate(*FAST, "--num", "2", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hint:" in error


def test_a_network_without_batch_norms(capsys):
    assert calibrate(factory="plain") == 2
    error = capsys.readouterr().err
    assert "no batch norms" in error
    assert "--images DIR" in " ".join(error.split())


def test_flags_of_this_mode_need_it(capsys):
    arguments = ["calibrate", "net.py:build", *PREPARED, "--out", "s.safetensors"]
    assert main([*arguments, "--images", ".", "--beside", ".", "--stretch", "off"]) == 2
    assert "--beside, --stretch: for --data-free only" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--data-free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "net.py/s.safetensors"], "net.py is not a folder"),
        (["--out", "folder.safetensors"], "it is a folder"),
        (["--images", "net.py/sheet"], "net.py is not a folder"),
        (["--seed", str(2**63)], "--seed"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_traced(
    tmp_path, capsys, monkeypatch, arguments, message
):
    (tmp_path / "folder.safetensors").mkdir()
    monkeypatch.setattr("metaaug_cli.synthesis.dgh._Synthesis", None)
    assert calibrate(*FAST, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".py") == ["folder.safetensors"]


def test_images_that_could_not_be_written_are_not_lost(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise InputError("cannot write images")

    with monkeypatch.context() as patch:
        patch.setattr("metaaug_cli.calibration.png_folder.write_pngs", full)
        assert calibrate(*FAST, "--num", "3", "--images", "sheet") == 2
    assert calibrate(*FAST, "--num", "3", "--images", "sheet", "--resume") == 0
    assert len(list((tmp_path / "sheet").iterdir())) == 3
    assert not state_path(tmp_path / "s.safetensors").exists()
