"""What a file says about its quantization: ours by its manifest, other tools' by their graph."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment.onnx_summary import summarize_onnx
from metaaug_cli.deployment.packing import pack
from metaaug_cli.errors import InputError


@pytest.mark.parametrize(("bits", "weight", "act"), [("W8A8", 8, 8), ("W4A4", 4, 4), ("W2A2", 2, 2)])
def test_bits_and_scales_per_layer(exported, bits, weight, act):
    graph, path = exported(bits)
    summary = summarize_onnx(path)
    layers = {layer.name: layer for layer in summary.layers}
    assert list(layers) == ["stem", "conv1", "conv2", "depthwise", "pointwise", "head"]
    assert {layers[n].bits for n in ("stem", "head")} == {8}
    assert layers["conv2"].bits == weight
    assert layers["conv2"].least_scale == pytest.approx(float(graph.conv2.scale.min()))
    assert layers["conv2"].greatest_scale == pytest.approx(float(graph.conv2.scale.max()))
    assert (layers["conv2"].shape, layers["conv2"].channels) == ((8, 8, 3, 3), 8)
    assert (layers["conv2"].op, layers["head"].op) == ("Conv", "Gemm")
    assert (layers["conv2"].bias, layers["pointwise"].bias) == ("int32", None)
    activations = {a.name: a for a in summary.activations}
    assert activations["act1"].bits == act
    assert activations["branch"].zero_point == 128
    assert activations["act1"].scale == pytest.approx(float(graph.act1.scale))
    assert all(a.integer for a in summary.activations)
    assert summary.float_layers == ()


@pytest.mark.parametrize("mode", ["packed", "native"])
def test_packed_files_tell_the_same(exported, tmp_path, mode):
    plain = summarize_onnx(exported("W4A4")[1])
    model = onnx.load(exported("W4A4")[1])
    pack(model, mode)
    path = tmp_path / "packed.onnx"
    onnx.save(model, path)
    summary = summarize_onnx(path)
    assert [(a.name, a.low, a.high) for a in summary.activations] == [
        (a.name, a.low, a.high) for a in plain.activations
    ]
    assert [(x.name, x.bits, x.shape) for x in summary.layers] == [
        (x.name, x.bits, x.shape) for x in plain.layers
    ]
    assert {x.name: x.stored for x in summary.layers}["conv1"] in ("uint4", "int4")
    assert summary.least_onnxruntime == {"packed": "1.23", "native": "1.31"}[mode]


def test_the_manifest_has_the_last_word_on_bits(exported, manifest):
    summary = summarize_onnx(exported("W2A4")[1])
    assert summary.manifest.model == manifest.model
    assert {x.name: x.bits for x in summary.layers}["conv1"] == 4  # as the manifest says
    plain = summary.to_dict()
    assert plain["manifest"]["method"] == "nearest"
    assert isinstance(plain["path"], str)


def other_tools_file(path):
    """As other tools write it: per-tensor int8, no names, a float layer, constants as nodes."""
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)
    weight.flat[:2] = -127, 127
    scale = numpy_helper.from_array(np.float32(0.1))
    nodes = [
        helper.make_node("Constant", [], ["s"], value=scale),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w_quantized", "ws"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], name="/features/Conv"),
        helper.make_node("Conv", ["c", "f"], ["y"], name="/last/Conv"),
    ]
    constants = {
        "z": np.uint8(3), "w_quantized": weight, "ws": np.float32(0.02),
        "b": np.zeros(4, np.float32), "f": np.ones((2, 4, 1, 1), np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="other.tool")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def test_files_of_other_tools(tmp_path):
    summary = summarize_onnx(other_tools_file(tmp_path / "other.onnx"))
    assert summary.manifest is None
    assert (summary.producer, summary.opset) == ("other.tool", 17)
    (layer,) = summary.layers
    assert (layer.name, layer.bits, layer.stored, layer.channels) == ("/features/Conv", 8, "int8", 1)
    assert layer.bias == "float"
    (activation,) = summary.activations
    assert (activation.zero_point, activation.bits) == (3, 8)
    assert activation.scale == pytest.approx(0.1)
    assert summary.float_layers == ("/last/Conv",)


def test_operators_that_nobody_defines_are_named(tmp_path):
    model = onnx.load(other_tools_file(tmp_path / "other.onnx"))
    assert summarize_onnx(tmp_path / "other.onnx").unknown_operators == ()
    end = model.graph.output[0].name
    extra = [("Mystery", ""), ("Fast", "vendor"), ("QuickGelu", "com.microsoft"), ("Relu", "")]
    extra.append(("SimplifiedLayerNormalization", ""))
    for op, domain in extra:
        model.graph.node.append(helper.make_node(op, [end], [f"after_{op}"], domain=domain))
    inner = helper.make_graph([helper.make_node("Inner", [], ["z"])], "then", [], [])
    model.graph.node.append(helper.make_node("If", [end], ["w"], then_branch=inner, else_branch=inner))
    onnx.save(model, tmp_path / "strange.onnx")
    assert summarize_onnx(tmp_path / "strange.onnx").unknown_operators == ("Inner", "Mystery", "vendor.Fast")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"hello world" * 20])
def test_what_is_no_onnx_file_is_an_input_error(tmp_path, content):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        summarize_onnx(path)
