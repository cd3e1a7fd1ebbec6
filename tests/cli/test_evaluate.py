"""``metaaug evaluate`` from the command line on a small network, its run and its files."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from evaluate_command import CLASSES, FLAGS, SIZE, evaluate, report_of

from metaaug_cli.verification.report import report_schema


@pytest.fixture(scope="module")
def onnx_file(work):
    """The file the run exported."""
    assert evaluate(work.run, "--data", work.val, "--quiet") == 0
    return work.run / "model.onnx"


def test_a_run_ends_in_the_table_the_verdict_and_the_kernels(work, capsys):
    assert evaluate(work.run, "--data", work.val) == 0
    out, err = capsys.readouterr()
    lines = out.strip().splitlines()
    assert re.search(r"^network +top-1 +drop +top-5 +NLL +ECE +float +simulated$", out, re.MULTILINE)
    rows = {line[:12].strip(): line[12:].split() for line in lines if re.match(r"float|simulated|ONNX", line)}
    assert rows["float"][:2] == ["80.00", "-"]
    assert set(rows) == {"float", "simulated", "ONNX Runtime"}
    assert re.search(r"^PASS  parity: all \d+ code tensors within tolerance$", out, re.MULTILINE)
    assert lines[-1] == "4 of 4 Conv/Gemm/Add nodes run as integers"
    assert max(map(len, out.splitlines())) <= 80
    assert "evaluate 60/60" in err


def test_the_report_holds_what_an_independent_count_finds(work, onnx_file, capsys):
    code, report = report_of(capsys, work.run, "--data", work.val)
    assert code == 0
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: work.inputs.numpy()})
    scores = report["evaluation"]["scores"]
    assert scores["float"]["top1"] == 0.8
    assert scores["onnxruntime"]["top1"] == np.mean(logits.argmax(1) == work.labels.numpy())
    assert report["data"] == {
        "folder": str(work.val),
        "images": 60,
        "available": 60,
        "labelled": True,
        "skipped": [],
    }
    assert report["onnx"]["bytes"] == onnx_file.stat().st_size
    assert report["kernels"]["integer"]["Conv"] == 2
    assert report["parity"]["passed"]
    assert report["parity"]["reference"] is None
    assert report["gates"] == []
    assert report["passed"]


def test_gates_that_hold(work, capsys, tmp_path):
    junit = tmp_path / "gates.xml"
    limits = ["--max-drop", "10", "--min-agreement", "0.8", "--parity", "--junit", junit]
    code, report = report_of(capsys, work.run, "--data", work.val, *limits)
    assert code == 0
    names = ["max-drop", "min-agreement", "parity-reference", "parity-simulation", "parity-accuracy"]
    assert [gate["name"] for gate in report["gates"]] == names
    assert report["passed"]
    assert report["parity"]["reference"] is True
    suite = ET.parse(junit).getroot().find("testsuite")
    assert [case.get("name") for case in suite.findall("testcase")] == names
    assert suite.get("failures") == "0"


@pytest.fixture
def tampered(onnx_file, tmp_path):
    """The exported file with the weights of one convolution scaled, as a faulty converter might."""
    model = onnx.load(onnx_file)
    name = next(
        node.input[1]
        for node in model.graph.node
        if node.op_type == "Conv" and "body" in node.input[1] + node.name
    )
    dequantize = next(node for node in model.graph.node if name in node.output)
    scale = next(item for item in model.graph.initializer if item.name == dequantize.input[1])
    scale.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name)
    )
    path = tmp_path / "tampered.onnx"
    onnx.save(model, path)
    return path


def test_a_missed_gate_is_exit_1_after_everything_was_written(work, tampered, capsys, tmp_path):
    junit, report_path = tmp_path / "gates.xml", tmp_path / "report.json"
    outputs = ["--json", report_path, "--junit", junit]
    code = evaluate(
        work.run, "--onnx", tampered, "--data", work.val, "--parity", "--min-agreement", 1, *outputs
    )
    out, err = capsys.readouterr()
    assert code == 1
    assert re.search(r"^error: \d of 4 gates missed: min-agreement, parity-simulation", err, re.MULTILINE)
    assert "FAIL  parity-simulation:" in out
    report = json.loads(report_path.read_text())
    jsonschema.validate(report, report_schema())
    assert not report["passed"]
    failed = next(gate for gate in report["gates"] if gate["name"] == "parity-simulation")
    differing = [layer["name"] for layer in report["parity"]["layers"] if layer["forced"]["mismatches"] > 3]
    assert failed["text"].startswith(f"{differing[0]} is the first layer to leave tolerance")
    assert "ONNX Runtime" in failed["text"]
    suite = ET.parse(junit).getroot().find("testsuite")
    assert int(suite.get("failures")) == sum(not gate["passed"] for gate in report["gates"])


def test_an_accuracy_that_is_lost_is_exit_1(work, tampered, capsys):
    code, report = report_of(capsys, work.run, "--onnx", tampered, "--data", work.val, "--max-drop", "-0")
    drop = report["evaluation"]["scores"]["onnxruntime"]["drop"]
    assert (code == 1) == (drop > 0)
    assert report["gates"][0]["measured"] == drop


def test_without_labels_agreement_and_parity_remain(work, capsys):
    assert evaluate(work.run, "--data", work.flat, "--min-agreement", "0.8") == 0
    out = capsys.readouterr().out
    assert "top-1" not in out.split("PASS")[0]
    assert "agreement" in out
    assert "PASS  parity" in out
    code, report = report_of(capsys, work.run, "--data", work.val, "--no-labels")
    assert code == 0
    assert report["evaluation"]["scores"]["float"]["top1"] is None


def test_an_onnx_file_with_its_float_network(work, onnx_file, capsys):
    spec, *rest = work.model
    code, report = report_of(capsys, onnx_file, "--data", work.val, "--model", spec, *rest, "--max-drop", 10)
    assert code == 0
    assert list(report["evaluation"]["scores"]) == ["float", "onnxruntime"]
    assert report["evaluation"]["scores"]["float"]["top1"] == 0.8
    assert report["parity"] is None


def test_our_own_file_knows_its_preprocessing(work, onnx_file, capsys):
    code, report = report_of(capsys, onnx_file, "--data", work.val)
    assert code == 0
    assert list(report["evaluation"]["scores"]) == ["onnxruntime"]
    assert 0.7 < report["evaluation"]["scores"]["onnxruntime"]["top1"] < 0.9


def test_the_files_own_preprocessing_goes_before_the_models(work, onnx_file, capsys):
    spec, *rest = work.model
    plain = report_of(capsys, onnx_file, "--data", work.val, "--model", spec, *rest)[1]
    silent = [spec, *rest[rest.index("--weights") : rest.index("--weights") + 2]]  # no --size, --mean, --std
    code, report = report_of(capsys, onnx_file, "--data", work.val, "--model", *silent)
    assert code == 0
    assert report["evaluation"]["scores"] == plain["evaluation"]["scores"]


@pytest.fixture
def foreign(work, tmp_path):
    """A float file of another tool with a fixed batch of 7: global pool, then Gemm."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.standard_normal((CLASSES, 3)).astype(np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([0, -1]), "shape")
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        onnx.helper.make_node("Reshape", ["p", "shape"], ["f"]),
        onnx.helper.make_node("Gemm", ["f", "w"], ["y"], transB=1),
    ]
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [7, 3, SIZE, SIZE])]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, [7, CLASSES])]
    graph = onnx.helper.make_graph(nodes, "foreign", inputs, outputs, [weight, shape])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    means = work.inputs.mean((2, 3)).numpy()
    return path, (means @ onnx.numpy_helper.to_array(weight).T).argmax(1)


def test_a_file_of_another_tool_with_a_fixed_batch(work, foreign, capsys):
    path, answers = foreign
    code, report = report_of(capsys, path, "--data", work.val, *FLAGS)
    assert code == 0
    assert report["evaluation"]["scores"]["onnxruntime"]["top1"] == np.mean(answers == work.labels.numpy())
    assert report["kernels"]["integer"] == {}


def test_kernels_left_in_float_are_named(work, foreign, capsys):
    assert evaluate(foreign[0], "--data", work.val, *FLAGS) == 0
    assert "0 of 1 Conv/Gemm/Add nodes run as integers" in capsys.readouterr().out


def test_a_sample_is_seeded_and_not_a_prefix(work, capsys):
    def labels_used(seed):
        _, report = report_of(capsys, work.run, "--data", work.val, "--num", 20, "--seed", seed)
        assert report["data"]["images"] == 20
        assert report["data"]["available"] == 60
        return report["evaluation"]["scores"]["float"]["nll"]

    assert labels_used(1) == labels_used(1)
    assert labels_used(1) != labels_used(2)


def test_unreadable_files_are_skipped_counted_and_named(work, capsys, tmp_path):
    folder = shutil.copytree(work.val, tmp_path / "val")
    (folder / "class0" / "broken.png").write_bytes(b"not an image")
    assert evaluate(work.run, "--data", folder, "--json", tmp_path / "r.json") == 0
    assert "1 unreadable files skipped" in capsys.readouterr().err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["data"]["images"] == 60
    assert "broken.png" in report["data"]["skipped"][0]


def test_a_run_directory_that_cannot_be_written(work, onnx_file, tmp_path, monkeypatch, capsys):
    run = Path(shutil.copytree(work.run, tmp_path / "run"))
    (run / "model.onnx").unlink()
    access = os.access

    def read_only(path, mode, **options):  # root may write everywhere
        return access(path, mode, **options) and not (mode & os.W_OK and Path(path) == run)

    monkeypatch.setattr(os, "access", read_only)
    code, report = report_of(capsys, run, "--data", work.val)
    assert code == 0
    assert report["parity"]["passed"]
    assert report["kernels"]["integer"]["Conv"] == 2
    assert not (run / "model.onnx").exists()


def test_the_accuracy_is_kept_in_the_run(work, onnx_file):
    kept = json.loads((work.run / "metrics.json").read_text())["evaluation"]
    assert kept["data"] == "val"
    assert kept["float"]["top1"] == 0.8


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["{run}", "--data", "{root}/none"], "does not exist", "folder of images"),
        (["{root}/none", "--data", "{val}"], "does not exist", "run directory or an .onnx"),
        (["{root}", "--data", "{val}"], "not a run directory", "quantize"),
        (["{root}/net.py", "--data", "{val}"], "neither a run directory nor an .onnx", None),
        (["{root}/bad.onnx", "--data", "{val}"], "not a readable ONNX file", None),
        (
            ["{run}", "--data", "{val}", "--mean", "1,1,1"],
            "--mean cannot be combined with a run",
            "leave them out",
        ),
        (["{run}", "--data", "{val}", "--max-drop", "-1"], "not between 0 and 100", "points"),
        (["{run}", "--data", "{val}", "--min-agreement", "99"], "not a fraction", "0.99"),
        (["{run}", "--data", "{flat}", "--max-drop", "1"], "needs labels", "--min-agreement"),
        (["{run}", "--data", "{val}", "--junit", "x.xml"], "no gate to show", "--max-drop"),
        (
            ["{run}", "--data", "{val}", "--parity", "--junit", "no/x.xml"],
            "there is no folder no",
            "writable",
        ),
        (
            ["{run}", "--data", "{val}", "--parity", "--json", "x.json", "--junit", "x.json"],
            "both name x.json",
            "a file each",
        ),
        (["{run}", "--data", "{val}/class0", "--classes", "{root}/net.py"], "", None),
        (["{run}", "--data", "{fewer}"], "5 class folders, the model has 6 outputs", "--classes"),
        (
            ["{run}", "--data", "{val}", "--json", "{root}/no/r.json"],
            "there is no folder",
            "folder that exists",
        ),
        (["{onnx}", "--data", "{val}", "--max-drop", "1"], "float network", "--model"),
        (["{onnx}", "--data", "{val}", "--parity"], "needs the simulation", "run directory"),
        (["{onnx}", "--data", "{val}", "--weights", "w.pt"], "--weights needs --model", "--model"),
        (["{onnx}", "--data", "{val}", "--size", "20"], "takes images of", "--size"),
        (["{onnx}", "--data", "{val}", "--size", "big"], "--size big", "224"),
        (["{onnx}", "--data", "{val}", "--std", "0,1,1"], "above 0", None),
        (["{onnx}", "--onnx", "{onnx}", "--data", "{val}"], "--onnx goes with a run directory", None),
        (["{run}", "--data", "{val}", "--no-labels", "--classes", "x"], "contradict", None),
    ],
)
def test_mistakes_are_exit_2_with_a_message_and_no_traceback(
    work, onnx_file, capsys, tmp_path, arguments, message, hint
):
    fewer = shutil.copytree(work.val, tmp_path / "fewer")
    shutil.rmtree(fewer / "class3")
    (work.root / "bad.onnx").write_bytes(b"\x00not onnx")
    places = {
        "root": work.root,
        "run": work.run,
        "val": work.val,
        "flat": work.flat,
        "fewer": fewer,
        "onnx": onnx_file,
    }
    assert evaluate(*(item.format(**places) for item in arguments)) == 2
    out, err = capsys.readouterr()
    text = " ".join(err.split())
    assert "error: " in text
    assert message in text
    assert "Traceback" not in text
    if hint is not None:
        assert hint in text.split("hint:")[1]
    assert out == "" or "--json" in arguments


def test_a_foreign_file_without_preprocessing_says_which_flags_are_missing(work, foreign, capsys):
    assert evaluate(foreign[0], "--data", work.val, "--size", SIZE) == 2
    err = capsys.readouterr().err
    assert "--mean, --std missing" in err
    assert "--model" in err


def test_an_empty_folder(work, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert evaluate(work.run, "--data", tmp_path / "empty") == 2
    assert "no images" in capsys.readouterr().err


def test_nothing_is_left_behind_by_a_refused_call(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(work.run, "--data", "none", "--json", "r.json", "--junit", "j.xml", "--parity") == 2
    assert list(Path(tmp_path).iterdir()) == []
