"""``metaaug export`` and ``metaaug inspect`` on a small run."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from user_code import classifier

from metaaug_cli.cli.app import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    (root / "net.py").write_text(classifier(5))
    namespace = {}
    exec(classifier(5), namespace)
    save_file(namespace["net"]().state_dict(), root / "net.safetensors")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
    return root


def quantized(root, bits):
    torch.manual_seed(0)
    arguments = ["quantize", f"{root / 'net.py'}:net", "--weights", str(root / "net.safetensors")]
    arguments += ["--calib", str(root / "images"), "--size", "12", "--mean", ".5,.5,.5", "--std", ".5,.5,.5"]
    arguments += ["--wbits", str(bits), "--abits", "4", "--set", f"quantization.first_last_bits={bits}"]
    out = root / f"run-w{bits}"
    if not out.exists():
        assert main([*arguments, "--method", "nearest", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def run(root):
    return quantized(root, 4)


def exported(run, capsys, *flags):
    path = run.parent / "model.onnx"
    code = main(["export", str(run), "-o", str(path), *flags, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return path, json.loads(captured.out), captured.err


def test_export_says_what_runs_as_integers(run, capsys):
    path, data, shown = exported(run, capsys)
    assert data["kernels"]["integer"]["Conv"] == 2
    assert data["kernels"]["float_nodes"] == []
    assert data["bytes"] == path.stat().st_size
    assert (data["pack"], data["least_onnxruntime"], data["session_options"]) == ("int8", "1.20", {})
    assert "Conv 2 of 2, Gemm 1 of 1, Add 1 of 1" in shown
    assert max(map(len, shown.splitlines())) <= 80
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((3, 3, 12, 12), np.float32)})[0].shape == (3, 5)


def test_every_pack_is_smaller_and_said(run, capsys):
    _, plain, _ = exported(run, capsys)
    _, packed, shown = exported(run, capsys, "--pack", "packed")
    assert packed["bytes"] < plain["bytes"]
    assert packed["kernels"] == plain["kernels"]
    assert "ONNX Runtime 1.23 or later" in shown
    _, native, shown = exported(run, capsys, "--pack", "native")
    assert native["bytes"] < plain["bytes"]
    assert native["session_options"] == {"session.disable_quant_qdq": "1"}
    assert "warning" in shown
    assert "session.disable_quant_qdq=1" in shown


def test_reduce_range_leaves_no_layer_that_saturates(run, capsys):
    _, data, shown = exported(run, capsys, "--reduce-range")
    assert data["saturating_layers"] == []
    assert "x64quantprecision" not in shown


@pytest.mark.parametrize(
    ("release", "pack", "least"), [("1.22", "int8", "1.20"), ("1.23.2", "packed", "1.23")]
)
def test_a_target_gets_the_smallest_form_it_runs_as_integers(run, capsys, release, pack, least):
    _, data, shown = exported(run, capsys, "--target-ort", release)
    assert (data["pack"], data["least_onnxruntime"]) == (pack, least)
    assert data["target_onnxruntime"] == release
    assert f"ONNX Runtime {release[:4]} runs this form as integers" in shown


@pytest.mark.parametrize(("release", "least"), [("1.24", "1.23"), ("1.25", "1.25")])
def test_packed_for_a_release_without_2_bit_kernels_is_stored_in_4_bits(root, capsys, release, least):
    run = quantized(root, 2)
    capsys.readouterr()
    _, data, _ = exported(run, capsys, "--target-ort", release, "--pack", "packed")
    assert (data["pack"], data["least_onnxruntime"]) == ("packed", least)


def test_a_target_newer_than_any_measured_is_a_warning(run, capsys):
    _, data, shown = exported(run, capsys, "--target-ort", "9.9")
    assert data["pack"] == "packed"
    assert "newer than" in shown


@pytest.mark.parametrize(
    ("flags", "reason", "hint"),
    [
        (["1.22", "--pack", "packed"], "cannot cast from uint4", "--pack int8 runs as integers in 1.22"),
        (["1.31", "--pack", "native"], "no integer kernels", "--pack packed runs as integers in 1.31"),
        (["1.19"], "nothing before ONNX Runtime 1.20", "leave --target-ort out"),
        (["new"], "is not a version", "--target-ort 1.22"),
    ],
)
def test_a_target_that_cannot_run_it_is_exit_code_2(run, capsys, tmp_path, flags, reason, hint):
    path = tmp_path / "model.onnx"
    assert main(["export", str(run), "-o", str(path), "--target-ort", *flags]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert reason in error
    assert hint in error.partition("hint:")[2]
    assert not path.exists()


def test_bench_compares_every_form_with_float(run, capsys):
    _, data, shown = exported(run, capsys, "--bench")
    assert list(data["latency"]) == ["float", "int8", "packed", "native"]
    sizes = {name: row["bytes"] for name, row in data["latency"].items()}
    assert sizes["packed"] < sizes["int8"]
    assert all(time > 0 for row in data["latency"].values() for time in row["milliseconds"].values())
    (line,) = (line for line in shown.splitlines() if line.startswith("float "))
    assert line.split()[-1] == "1.00"
    assert "batch 8" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_inspect_reads_the_export_back(run, capsys):
    path, _, _ = exported(run, capsys)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("nearest, integer placement", "stem", "body", "head", "12x12", "recipe hash"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["inspect", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {layer["name"]: layer["bits"] for layer in data["layers"]} == {"stem": 4, "body": 4, "head": 4}
    assert data["manifest"]["preprocessing"]["size"] == [12, 12]


def test_inspect_works_without_a_manifest(run, capsys):
    path, _, _ = exported(run, capsys)
    model = onnx.load(path)
    del model.metadata_props[:]
    bare = path.with_name("bare.onnx")
    onnx.save(model, bare)
    assert main(["inspect", str(bare)]) == 0
    captured = capsys.readouterr()
    assert "body" in captured.out
    assert "opset" not in captured.out.split("loads in")[1]
    assert "no metaaug manifest" in captured.err
    model.opset_import[0].version = 24
    onnx.save(model, bare)
    assert main(["inspect", str(bare)]) == 0
    assert "its opset may need a newer one" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "missing-run", "-o", "m.onnx"],
        ["export", "RUN", "-o", "."],
        ["export", "RUN", "-o", "missing/m.onnx"],
        ["export", "RUN"],
        ["export", "RUN", "-o", "m.onnx", "--pack", "zip"],
        ["inspect", "missing.onnx"],
        ["inspect", "RUN"],
    ],
)
def test_mistakes_are_exit_code_2(run, capsys, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if item == "RUN" else item for item in arguments]) == 2
    error = capsys.readouterr().err
    assert "error" in error.lower()
    assert "Traceback" not in error
