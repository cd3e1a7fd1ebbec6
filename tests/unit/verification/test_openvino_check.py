"""A second runtime on the exported files; without OpenVINO only what is said about its absence."""

import sys
from dataclasses import replace

import onnx
import pytest
import torch

from metaaug_cli.deployment.ort import open_session
from metaaug_cli.deployment.packing import pack
from metaaug_cli.errors import InputError
from metaaug_cli.verification import openvino_check
from metaaug_cli.verification.evaluation import Score
from metaaug_cli.verification.openvino_check import OpenVinoLayers, open_openvino, summarize

SCORE = Score(None, None, None, None, None, None, {"float": 0.5, "onnxruntime": 0.75}, {"onnxruntime": 0.2})


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="the openvino extra is not installed", exc_type=ImportError)


def saved(exported, tmp_path, bits, mode):
    model = onnx.load(exported(bits)[1])
    pack(model, mode)
    path = tmp_path / f"{mode}.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("bits", "mode"), [("W8A8", "int8"), ("W4A4", "int8"), ("W4A4", "packed"), ("W2A4", "int8")]
)
def test_every_layer_runs_as_8_bit_and_agrees(openvino, exported, networks, tmp_path, bits, mode):
    path = saved(exported, tmp_path, bits, mode)
    predict, kernels = open_openvino(path)
    assert (kernels.integer, kernels.layers, kernels.float_layers) == (6, 6, ())
    images = networks.images()
    (logits,) = open_session(path).run(None, {"input": images.numpy()})
    reference = torch.from_numpy(logits)
    found = predict(images)
    assert found.shape == reference.shape
    assert (found - reference).abs().max() < 0.25 * reference.std()


def test_2_bit_types_are_refused_with_a_form_that_loads(openvino, exported, tmp_path):
    with pytest.raises(InputError, match="does not load") as error:
        open_openvino(saved(exported, tmp_path, "W2A2", "packed"))
    assert "--pack int8" in error.value.hint


def test_a_fixed_batch_is_filled_up(openvino, exported, networks, tmp_path):
    model = onnx.load(exported("W8A8")[1])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "fixed.onnx")
    predict, _ = open_openvino(tmp_path / "fixed.onnx")
    assert len(predict(networks.images()[:3])) == 3


def test_without_the_extra_the_command_to_install_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="OpenVINO is not installed") as error:
        open_openvino(tmp_path / "any.onnx")
    assert error.value.hint == "pip install openvino"
    assert error.value.exit_code == 2


class Node:
    def __init__(self, name, kind, precision):
        text = lambda value: type("Any", (), {"astype": lambda _, __: value})()  # noqa: E731
        self.name, self.info = name, {"layerType": text(kind), "runtimePrecision": text(precision)}

    def get_rt_info(self):
        return self.info

    def get_friendly_name(self):
        return self.name


def test_layers_are_counted_by_the_precision_they_run_in():
    nodes = [
        Node("a", "Convolution", "u8"),
        Node("b", "Convolution", "f32"),
        Node("c", "FullyConnected", "i8"),
        Node("d", "Eltwise", "f32"),
        Node("e", "Const", "i8"),
    ]
    model = type("Model", (), {"get_ops": lambda _: nodes})()
    assert openvino_check._count("1", model) == OpenVinoLayers("1", 2, 3, ("b",))


def test_the_summary_is_the_distance_from_onnx_runtime():
    layers = OpenVinoLayers("2026.4.1", 3, 3, ())
    found = summarize(layers, {"openvino": SCORE, "onnxruntime": replace(SCORE, agreement={})})
    assert (found.kernels, found.agreement, found.max_logit_difference) == (layers, 0.75, 0.2)
