"""``metaaug calibrate inspect --model`` and ``compare``: verdicts, exit codes, and what goes wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from metaaug_cli.cli.app import main

NETWORK = """
from torch import nn

def build(norm=nn.BatchNorm2d):
    layers = []
    for inputs in (3, 6, 6, 6):
        layers += [nn.Conv2d(inputs, 6, 3, padding=1), norm(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

def plain():
    return build(nn.Identity)
"""
FLAGS = ["--size", "12", "--mean", ".5,.5,.5", "--std", ".25,.25,.25"]


def pixels(count, seed):
    """Reddish uint8 pictures (N, 12, 12, 3)."""
    noise = np.random.default_rng(seed).integers(0, 120, (count, 12, 12, 3))
    return (noise + np.array([120, 60, 10])).astype(np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a network whose batch norms remember reddish images, and with image folders."""
    root = tmp_path_factory.mktemp("check")
    (root / "net.py").write_text(NETWORK)
    space = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    network = space["build"]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    batch = torch.from_numpy(pixels(400, 0)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        network.train()((batch - 0.5) / 0.25)
    save_file(network.state_dict(), root / "net.safetensors")
    for name, order in (("right", [0, 1, 2]), ("swapped", [2, 1, 0])):
        (root / name).mkdir()
        for index, image in enumerate(pixels(40, 7)):
            Image.fromarray(np.ascontiguousarray(image[:, :, order])).save(root / name / f"{index:02d}.png")
    return root


@pytest.fixture
def model(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--model", f"{prepared}/net.py:build", "--weights", f"{prepared}/net.safetensors"]


def words(text):
    return " ".join(text.split())


def test_a_folder_that_suits(prepared, model, tmp_path, capsys):
    page = ["--html", "page.html"]
    assert main(["calibrate", "inspect", f"{prepared}/right", *model, *FLAGS, *page, "--strict"]) == 0
    output = capsys.readouterr()
    assert "PASS These 40 images suit net.build:" in words(output.out)
    assert all(len(line) <= 80 for line in output.out.splitlines())
    text = (tmp_path / "page.html").read_text()
    assert "<strong>Suits.</strong>" in text
    assert text.count("<rect") == 4


def test_swapped_channels_fail_only_when_strict(prepared, model, tmp_path, capsys):
    command = ["calibrate", "inspect", f"{prepared}/swapped", *model, *FLAGS, "--html", "page.html"]
    assert main([*command, "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["check"]["suits"] is False
    assert report["check"]["findings"][0]["name"] == "bgr"
    assert "FAIL These 40 images do not suit net.build: they look like BGR" in words(output.err)
    assert main([*command, "--strict", "-q"]) == 1
    error = capsys.readouterr().err
    assert "error: the set does not suit the model" in error
    assert "hint: swap red and blue" in words(error)
    assert "Does not suit." in (tmp_path / "page.html").read_text()


def test_a_stored_set_says_how_it_was_prepared(prepared, model, capsys):
    build = ["calibrate", *model[1:], *FLAGS, "--images", f"{prepared}/right", "--out", "set.safetensors"]
    assert main([*build, "-q"]) == 0
    capsys.readouterr()
    assert main(["calibrate", "inspect", "set.safetensors", *model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["suits"] is True
    other = ["--mean", ".4,.5,.5"]
    assert main(["calibrate", "inspect", "set.safetensors", *model, *other]) == 0
    assert "prepared for another model (mean: 0.5 0.5 0.5, not 0.4 0.5 0.5)" in words(capsys.readouterr().out)


def test_compare_measures_against_halves(prepared, model, capsys):
    command = ["calibrate", "compare", f"{prepared}/right"]
    assert main([*command, f"{prepared}/swapped", *model, *FLAGS, "--json"]) == 0
    output = capsys.readouterr()
    apart = json.loads(output.out)
    assert apart["farther"] == apart["splits"]
    assert apart["distance"] > 3 * apart["halves"]
    assert apart["second_to_stored"] > apart["first_to_stored"]
    assert f"right and swapped are {apart['distance']:.3f} standard deviations apart" in words(output.err)
    assert "they say nothing about accuracy" in words(output.err)
    assert main([*command, f"{prepared}/right", *model, *FLAGS]) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines() if "/" not in line)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["inspect", "{root}/right"], "is a folder, so the model's preprocessing", "--model MODEL"),
        (["inspect", "{root}/right", "--strict"], "--strict needs a model", "--model"),
        (["inspect", "{root}/right", "--size", "12"], "--size needs a model", "--model"),
        (["inspect", "{root}/right", "--model", "{root}/net.py:plain", "--weights", "random", *FLAGS],
         "the network has no batch norms", "leave --model out"),
        (["inspect", "absent", "--model", "{root}/net.py:build", "--weights", "random", *FLAGS],
         "absent does not exist", "folder of images"),
        (["compare", "{root}/right", "{root}/swapped", "--model", "{root}/net.py:plain", "--weights",
          "random", *FLAGS], "the network has no batch norms", "a model with batch norms"),
        (["compare", "{root}/right", "{root}/swapped"], "Missing option '--model'", "--help"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2_and_a_hint(prepared, model, capsys, arguments, message, hint):
    assert main(["calibrate", *(part.format(root=prepared) for part in arguments)]) == 2
    error = words(capsys.readouterr().err)
    assert message in error
    assert hint in error.split("hint:")[1]
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_help_fits_80_columns(command, capsys):
    assert main(["calibrate", command, "--help"]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
