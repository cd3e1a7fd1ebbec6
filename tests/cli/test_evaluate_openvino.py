"""``metaaug evaluate --openvino``: a second runtime beside ONNX Runtime."""

import sys

import pytest
from evaluate_command import evaluate, report_of


def test_openvino_beside_onnx_runtime(work, capsys):
    pytest.importorskip("openvino", reason="the openvino extra is not installed", exc_type=ImportError)
    code, report = report_of(capsys, work.run, "--data", work.val, "--openvino")
    assert code == 0
    found = report["openvino"]
    assert found["kernels"]["integer"] == found["kernels"]["layers"] == 3
    assert found["agreement"] == report["evaluation"]["scores"]["openvino"]["agreement"]["onnxruntime"]
    assert found["agreement"] >= 0.9
    assert evaluate(work.run, "--data", work.val, "--openvino") == 0
    out = capsys.readouterr().out
    assert "3 of 3 convolutions and linear layers run as 8-bit" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_openvino_without_its_extra(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert evaluate(work.run, "--data", work.val, "--openvino") == 2
    error = capsys.readouterr().err
    assert "OpenVINO is not installed" in error
    assert "hint: pip install openvino" in error
