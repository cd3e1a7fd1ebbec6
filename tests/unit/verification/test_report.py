"""The report's schema, its publication, and JUnit XML."""

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest
import torch

from metaaug_cli.files import write_atomically
from metaaug_cli.verification.evaluation import Predictions, score
from metaaug_cli.verification.gates import accuracy_gates
from metaaug_cli.verification.openvino_check import OpenVinoLayers, OpenVinoReport
from metaaug_cli.verification.parity import Comparison, LayerParity, Parity, Worst
from metaaug_cli.verification.report import (
    DataSummary,
    Kernels,
    Report,
    describe_onnx,
    report_schema,
    report_to_dict,
    summarize_parity,
    write_junit,
)

WORST = Worst((3, 1, 0, 2), ours=4, runtime=5, value=4.49)
PARITY = Parity(
    images=20,
    layers=(
        LayerParity("stem", 1280, Comparison(), Comparison(1, 1, WORST), Comparison(), exact=True),
        LayerParity("head", 160, Comparison(), Comparison(), exact=True),
    ),
    max_logit_difference=0.01,
    logit_std=1.5,
    top1_agreement=1.0,
)
PUBLISHED = Path(__file__).parents[3] / "docs" / "reference" / "report.schema.json"


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"bytes of a model")
    target = torch.arange(20) % 8
    eye = torch.eye(8)
    answers = target.clone()
    answers[0] += 1
    logits = {"float": eye[target], "simulated": eye[answers], "onnxruntime": eye[answers]}
    evaluation = score(Predictions(logits, target))
    gates = accuracy_gates(evaluation, max_drop=1, min_agreement=0.5)
    return Report(
        schema_version=1,
        target="runs/r20",
        data=DataSummary("val", 20, 21, True, ("val/a.jpg: truncated",)),
        onnx=describe_onnx(path),
        evaluation=evaluation,
        parity=summarize_parity(PARITY),
        kernels=Kernels({"Conv": 19, "Gemm": 1}, {"Add": 1}, ("Add layer1.add",)),
        gates=tuple(gates),
        passed=False,
        versions={"python": "3.11"},
        openvino=OpenVinoReport(OpenVinoLayers("2026.4.1", 20, 21, ("fc",)), 0.95, 0.2),
    )


def test_a_report_is_valid_under_the_published_schema(report):
    schema = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report_to_dict(report), schema)


def test_the_published_schema_is_the_current_one():
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == report_schema(), (
        "run: python scripts/write_report_schema.py"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("passed",), "yes"),
        (("evaluation", "scores", "float", "top1"), "88 %"),
        (("gates", 0, "passed"), None),
        (("kernels", "integer", "Conv"), 1.5),
        (("parity", "layers", 0, "forced", "worst", "index"), "3"),
        (("parity", "passed"), 1),
    ],
)
def test_the_schema_refuses_wrong_values(report, path, value):
    document = report_to_dict(report)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, report_schema())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Report)])
def test_the_schema_requires_every_field(report, field):
    document = report_to_dict(report)
    del document[field]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, report_schema())


def test_fields_may_be_added_within_a_version(report):
    jsonschema.validate({**report_to_dict(report), "added_later": 1}, report_schema())


def test_the_hash_is_the_files(report):
    assert report.onnx.bytes == 16
    assert report.onnx.sha256 == "ee2e0a3346657b1dbd44e84a7bd5147a66a22b60717f666ee39e6b0309777511"


def test_junit_shows_each_gate_as_a_test(report, tmp_path):
    path = tmp_path / "junit.xml"
    write_junit(path, report.gates, target="runs/r20.onnx", properties={"top1 float": 1.0})
    root = ET.parse(path).getroot()
    suite = root.find("testsuite")
    assert (root.tag, suite.get("tests"), suite.get("failures"), suite.get("errors")) == (
        "testsuites",
        "2",
        "1",
        "0",
    )
    drop, agreement = suite.findall("testcase")
    assert (drop.get("classname"), drop.get("name")) == ("metaaug.r20_onnx", "max-drop")
    assert drop.find("failure").get("message").startswith("onnxruntime loses 5.00")
    assert agreement.find("failure") is None
    assert "95.00 %" in agreement.find("system-out").text
    assert suite.find("properties/property").attrib == {"name": "top1 float", "value": "1.0"}


def test_junit_escapes_what_xml_cannot_hold(tmp_path, report):
    gate = dataclasses.replace(report.gates[0], text='<conv> & "layer"\x00')
    write_junit(tmp_path / "j.xml", [gate], target="t", properties={})
    case = ET.parse(tmp_path / "j.xml").getroot().find("testsuite/testcase/failure")
    assert case.get("message") == '<conv> & "layer"?'


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metaaug_cli.files.os.replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_the_parity_summary_keeps_what_was_found(report):
    kept = report_to_dict(report)["parity"]
    assert kept["passed"]
    assert kept["reference"] is None
    assert kept["layers"][0]["forced"]["worst"]["index"] == [3, 1, 0, 2]
    assert [layer["name"] for layer in kept["layers"]] == ["stem", "head"]
    jsonschema.validate({**report_to_dict(report), "parity": None}, report_schema())
