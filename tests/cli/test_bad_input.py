"""What a first-time user gets wrong: one clear error, the right exit code, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from metaaug_cli.cli.app import main

NETWORKS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, *, flat=True):
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.stem, self.body = flat, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x = self.body(torch.relu(self.stem(x))).mean((2, 3), keepdim=True)
        return x.flatten(1) if self.flat else x


def net():
    return Net()


def unflattened():
    return Net(flat=False)


def sized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 5))


def diverged():
    network = Net()
    network.body.bias.data[2] = float("nan")
    return network
"""
SIZES = ["--size", "12", "--mean", ".5,.5,.5", "--std", ".5,.5,.5"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "nets.py").write_text(NETWORKS)
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    return folder


def quantize(root, *flags, factory="net", sizes=SIZES, weights="random"):
    arguments = ["quantize", f"{root / 'nets.py'}:{factory}", "--weights", str(weights), *sizes]
    return main([*arguments, "--calib", str(root / "images"), "--method", "nearest", *map(str, flags)])


@pytest.fixture(scope="module")
def finished(root):
    assert quantize(root, "--out", root / "finished", "-q", "--wbits", 3) == 0
    return root / "finished"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(capsys, code, *texts):
    """The captured error names every text and shows no traceback."""
    err = " ".join(capsys.readouterr().err.split())
    assert "error: " in err
    assert "unexpected" not in err, err
    for text in texts:
        assert text in err, err
    return code


def test_a_flag_out_of_range_is_named_as_it_was_typed(root, capsys):
    assert quantize(root, "--wbits", 9, "--batch", 0) == 2
    refused(capsys, 2, "--wbits: must be less than or equal to 8, not 9", "--batch: must be")


@pytest.mark.parametrize(("value", "said"), [("inf", "inf is not a number of GiB"), ("nan", "'--cache-gb'")])
def test_a_cache_of_no_size_is_refused(root, capsys, value, said):
    assert quantize(root, "--cache-gb", value) == 2
    refused(capsys, 2, said)


def test_json_without_a_name(run, root, capsys):
    assert main(["evaluate", str(run), "--data", str(root / "images"), "--json="]) == 2
    refused(capsys, 2, "--json= names no file")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [([], "but nothing"), ([["n", "k"]], "['n', 'k']"), ([["n", 3, 12, 12]] * 2, "x0 tensor(float)")],
)
def test_an_onnx_file_that_takes_no_images(root, run, capsys, tmp_path, shapes, said):
    inputs = [helper.make_tensor_value_info(f"x{i}", 1, shape) for i, shape in enumerate(shapes)]
    node = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("v", 1, [1, 5], [0.0] * 5))
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, [1, 5])])
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "odd.onnx")
    odd, data = str(tmp_path / "odd.onnx"), ["--data", str(root / "images")]
    for command in (["evaluate", odd, *data, *SIZES], ["evaluate", str(run), "--onnx", odd, *data]):
        assert main(command) == 2
        refused(capsys, 2, "the file does not take one batch of float32 images", said)


def test_an_unknown_augmentation_is_told_the_known_ones(root, capsys):
    assert quantize(root, "--augment", "blur") == 2
    refused(capsys, 2, "--augment: no augmentation named 'blur'", "operations joined by +: flip, crop")
    assert quantize(root, "--augment", "metaaug+trivial-geometry") == 2
    refused(capsys, 2, "did you mean 'trivial-geometric'?")


def test_a_size_the_network_was_not_made_for(root, capsys, tmp_path):
    assert quantize(root, "--size", 13, "--out", tmp_path / "run", factory="sized") == 2
    refused(capsys, 2, "does not run on images of 13x13", "check that --size")


def test_an_output_that_is_no_row_of_logits_is_refused(root, capsys, tmp_path):
    assert quantize(root, "--out", tmp_path / "run", factory="unflattened") == 3
    refused(capsys, 3, "gives (5, 1, 1) for an image, not a row of logits", "flatten(1)")


def test_weights_that_are_not_finite_are_refused_before_any_work(root, capsys, tmp_path):
    assert quantize(root, "--out", tmp_path / "run", factory="diverged") == 2
    refused(capsys, 2, "NaN or infinite values in the weights", "body.bias")
    assert not (tmp_path / "run").exists()


def test_grey_preprocessing_for_a_colour_network(root, capsys, tmp_path):
    sizes = ["--size", "12", "--mean", ".5", "--std", ".5"]
    assert quantize(root, "--out", tmp_path / "run", sizes=sizes) == 2
    refused(capsys, 2, "takes images of 3 channels, the preprocessing gives 1", "--mean and --std")


def test_an_image_too_large_for_the_memory(root, capsys, tmp_path):
    assert quantize(root, "--size", 1_000_000, "--out", tmp_path / "run") == 3
    refused(capsys, 3, "out of memory", "--size")


def test_a_folder_of_other_files_is_not_written_into(root, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert quantize(root, "--out", tmp_path) == 2
    refused(capsys, 2, "holds other files: notes.txt", "another --out")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_file_as_run_directory(root, capsys):
    assert quantize(root, "--out", root / "nets.py") == 2
    refused(capsys, 2, "nets.py is a file")


def test_a_report_that_could_not_be_written_is_refused_before_the_run(root, capsys, tmp_path):
    assert quantize(root, "--out", tmp_path / "run", "--json", tmp_path / "no" / "report.json") == 2
    refused(capsys, 2, "there is no folder")
    assert not (tmp_path / "run").exists()


def test_unreadable_calibration_images_are_named(root, capsys, tmp_path):
    folder = Path(shutil.copytree(root / "images", tmp_path / "images"))
    (folder / "broken.jpg").write_bytes(b"no image")
    arguments = ["quantize", f"{root / 'nets.py'}:net", "--weights", "random", *SIZES, "--method", "nearest"]
    assert main([*arguments, "--calib", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "1 unreadable files skipped:\n  broken.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", "[]"),
        ("run.json", '{"schema_version": 1}'),
        ("run.json", "[" * 100_000),
        ("recipe.yaml", "{}"),
        ("recipe.yaml", None),
        ("float.pt2", "half"),
        ("float.pt2", None),
        ("blocks/001-body.json", "{}"),
        ("blocks/001-body.json", None),
        ("blocks/001-body.safetensors", "half"),
        ("blocks/001-body.safetensors", None),
    ],
)
def test_a_damaged_run_is_refused_and_resume_repairs_it(root, run, capsys, file, content):
    path = run / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert main(["export", str(run), "-o", str(run.parent / "model.onnx")]) == 2
    refused(capsys, 2, path.name)
    if file != "run.json":
        assert quantize(root, "--out", run, "-q", "--wbits", 3, "--resume") == 0
        assert main(["export", str(run), "-o", str(run.parent / "model.onnx"), "-q"]) == 0


def test_another_suffix_than_onnx_is_refused_before_anything_is_written(run, capsys, tmp_path):
    assert main(["export", str(run), "-o", str(tmp_path / "model.txt")]) == 2
    refused(capsys, 2, "does not end in .onnx", "model.onnx")
    assert not (tmp_path / "model.txt").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("preprocessing", 3), ("fingerprint", [1]), ("fingerprint", {}), ("blocks", None)]
)
def test_a_run_whose_facts_are_of_another_kind_is_refused(root, run, capsys, key, value):
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, key: value}))
    assert main(["export", str(run), "-o", str(run.parent / "model.onnx")]) == 2
    refused(capsys, 2, f"run.json is damaged: {key} missing or of another kind")
    assert quantize(root, "--out", run, "-q", "--wbits", 3, "--resume") == 2
    refused(capsys, 2, f"run.json is damaged: {key} missing or of another kind")


def test_blocks_whose_run_file_is_lost_are_not_overwritten(root, run, capsys):
    (run / "run.json").unlink()
    before = sorted(p.name for p in (run / "blocks").iterdir())
    assert quantize(root, "--out", run, "-q", "--wbits", 3) == 2
    refused(capsys, 2, "run.json is lost", "another --out")
    assert sorted(p.name for p in (run / "blocks").iterdir()) == before


def test_a_name_that_no_file_can_have(run, capsys, tmp_path):
    assert main(["export", str(run), "-o", str(tmp_path / ("x" * 300 + ".onnx"))]) == 2
    refused(capsys, 2, "File name too long")


def test_a_pipe_in_place_of_an_onnx_file(root, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    for command in (["inspect"], ["evaluate", "--data", str(root / "images")]):
        assert main([command[0], str(tmp_path / "pipe.onnx"), *command[1:]]) == 2
        refused(capsys, 2, "pipe.onnx is not a file")


def test_damaged_metrics_do_not_stand_in_the_way(run, capsys):
    for text in ("{", "[" * 100_000):
        (run / "metrics.json").write_text(text)
        assert main(["export", str(run), "-o", str(run.parent / "model.onnx")]) == 0
        assert "cannot read" in capsys.readouterr().err


def test_a_file_in_place_of_a_folder_in_the_output_path(run, root, capsys):
    assert main(["export", str(run), "-o", str(root / "nets.py" / "model.onnx")]) == 2
    refused(capsys, 2, "cannot write", "nets.py/model.onnx: Not a directory")


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_keeps_its_blocks_and_says_how_to_go_on(root, tmp_path, stop, code):
    arguments = ["quantize", f"{root / 'nets.py'}:net", "--weights", "random", *SIZES]
    arguments += ["--calib", str(root / "images"), "--out", str(tmp_path / "run"), "--iterations", "200000"]
    started = subprocess.Popen(
        [sys.executable, "-m", "metaaug_cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    started.send_signal(stop)
    time.sleep(0.05)
    started.send_signal(stop)  # an impatient second one must not cut the answer short
    _, err = started.communicate(timeout=60)
    assert started.returncode == code
    assert "error: interrupted" in err
    assert "no block was finished yet; continue with" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
