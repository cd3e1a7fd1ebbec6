"""Graphs that other tools write: what they hold is read or left out, and never an error."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment.onnx_summary import summarize_onnx
from metaaug_cli.deployment.onnx_view import GraphView, code_tensors, weight_tensors
from metaaug_cli.deployment.packing import pack, saturating_layers

WEIGHTS = np.random.default_rng(0).integers(-127, 128, (10, 3)).astype(np.int8)
WEIGHTS.flat[:2] = -127, 127


def linear(*before, outputs=(), inputs=(), codes=WEIGHTS, dequantize=("q", "s", "z"), **constants):
    """A linear layer of ``dequantize`` after the nodes ``before``, with constants q, s and z."""
    nodes = [
        *before,
        helper.make_node("DequantizeLinear", dequantize, ["w"], axis=0),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, name="fc"),
    ]
    constants = {"q": codes, "s": np.float32(0.02), "z": np.int8(0), **constants}
    graph = helper.make_graph(
        nodes,
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]), *inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10]), *outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def summary_of(model, tmp_path):
    onnx.save(model, tmp_path / "other.onnx")
    return summarize_onnx(tmp_path / "other.onnx")


def identity(source, result):
    return helper.make_node("Identity", [source], [result])


@pytest.mark.parametrize(
    ("before", "dequantize"),
    [
        ([identity("s", "s2")], ("q", "s2", "z")),
        ([identity("s", "s2"), identity("s2", "s3")], ("q", "s3", "z")),
        ([identity("z", "z2")], ("q", "s", "z2")),
        ([identity("q", "q2")], ("q2", "s", "z")),
        ([helper.make_node("Constant", [], ["s2"], value_float=0.02)], ("q", "s2", "z")),
        (
            [helper.make_node("Constant", [], ["s2"], value_floats=[0.02] * 10)],
            ("q", "s2"),
        ),
    ],
)
def test_constants_are_found_wherever_they_stand(tmp_path, before, dequantize):
    summary = summary_of(linear(*before, dequantize=dequantize), tmp_path)
    (layer,) = summary.layers
    assert (layer.name, layer.op, layer.bits, layer.symmetric) == ("fc", "Gemm", 8, True)
    assert layer.least_scale == pytest.approx(0.02)
    assert summary.saturating == (
        ("q",) if dequantize[0] == "q" and len(dequantize) == 3 else summary.saturating
    )


@pytest.mark.parametrize(
    ("before", "result"),
    [
        (helper.make_node("Constant", [], ["c"], value_int=3), [3]),
        (helper.make_node("Constant", [], ["c"], value_ints=[3, 4]), [3, 4]),
        (helper.make_node("Constant", [], ["c"], value_string="text"), None),
    ],
)
def test_constants_of_other_kinds(before, result):
    view = GraphView(linear(before))
    assert ("c" in view.constants) == (result is not None)
    if result is not None:
        assert view.constant("c").reshape(-1).tolist() == result


@pytest.mark.parametrize("unknown", ["s", "z"])
def test_a_weight_whose_grid_is_computed_is_left_out(tmp_path, unknown):
    kind = {"s": TensorProto.FLOAT, "z": TensorProto.INT8}[unknown]
    dequantize = ["given" if name == unknown else name for name in ("q", "s", "z")]
    given = helper.make_tensor_value_info("given", kind, [])
    summary = summary_of(linear(dequantize=dequantize, inputs=[given]), tmp_path)
    assert (summary.layers, summary.saturating) == ((), ())


def test_a_single_number_is_no_weight(tmp_path):
    number = [
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["factor"]),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
    ]
    summary = summary_of(linear(*number, c=np.int8(127)), tmp_path)
    assert [layer.name for layer in summary.layers] == ["fc"]
    assert summary.saturating == ("q",)


def test_a_weight_that_nobody_reads(tmp_path):
    unread = helper.make_node("DequantizeLinear", ["r", "s", "z"], ["v"])
    output = helper.make_tensor_value_info("v", TensorProto.FLOAT, [10, 3])
    summary = summary_of(linear(unread, outputs=[output], r=WEIGHTS), tmp_path)
    assert [(layer.name, layer.op) for layer in summary.layers] == [("r", ""), ("fc", "Gemm")]
    assert summary.saturating == ("q",)


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_null_in_json(tmp_path, scale):
    summary = summary_of(linear(s=np.float32(scale)), tmp_path)
    assert not np.isfinite(summary.layers[0].greatest_scale)
    (layer,) = json.loads(json.dumps(summary.to_dict(), allow_nan=False))["layers"]
    assert (layer["least_scale"], layer["greatest_scale"]) == (None, None)
    assert layer["shape"] == [10, 3]


def test_scales_per_block_are_read(tmp_path):
    scales = np.full((5, 3), 0.1, np.float32)
    model = linear(s=scales, z=np.zeros((5, 3), np.int8))
    model.graph.node[0].attribute.append(helper.make_attribute("block_size", 2))
    onnx.checker.check_model(model, full_check=True)
    (layer,) = summary_of(model, tmp_path).layers
    assert (layer.bits, layer.channels) == (8, 15)


@pytest.mark.parametrize(
    ("codes", "zero_points", "bits"),
    [
        (np.full((10, 1), 127, np.int8), np.zeros(10, np.int8), 7),  # not 1: 0 is on the grid as well
        (np.full((10, 1), 131, np.uint8), np.full(10, 128, np.uint8), 2),
        (np.full((10, 1), 3, np.int8), np.zeros(10, np.int8), 2),
        (np.zeros((10, 1), np.int8), np.zeros(10, np.int8), 1),
    ],
)
def test_bits_hold_codes_and_zero_points(codes, zero_points, bits):
    dequantize = helper.make_node("DequantizeLinear", ["r", "rs", "rz"], ["v"], axis=0)
    model = linear(dequantize, r=codes, rs=np.ones(10, np.float32), rz=zero_points)
    assert weight_tensors(model)[0].bits == bits


def test_packed_codes_have_the_bits_of_the_codes_they_stand_for():
    codes = np.array([[5], [6]] * 5, np.int8)
    plain = linear(codes=np.repeat(codes, 3, axis=1), s=np.ones(10, np.float32), z=np.zeros(10, np.int8))
    packed = onnx.ModelProto.FromString(plain.SerializeToString())
    pack(packed, "packed")
    assert [w.bits for w in weight_tensors(packed)] == [w.bits for w in weight_tensors(plain)] == [3]


def quantized_input(*before, source="x", grid=("s", "a"), **constants):
    """The linear layer behind a quantizer with scale ``s`` and zero point ``a``."""
    nodes = [
        *before,
        helper.make_node("QuantizeLinear", [source, *grid], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", *grid], ["xd"]),
    ]
    model = linear(*nodes, **{"a": np.uint8(10), **constants})
    model.graph.node[-1].input[0] = "xd"
    return model


def test_bounds_may_be_infinite_or_per_channel():
    clip = helper.make_node("Clip", ["x", "zero", "far"], ["bounded"])
    model = quantized_input(clip, source="bounded", zero=np.float32(0), far=np.float32(np.inf))
    assert [(t.low, t.high) for t in code_tensors(model)] == [(10, 255)]
    least = helper.make_node("Max", ["x", "several"], ["bounded"])
    model = quantized_input(least, source="bounded", several=np.zeros(3, np.float32))
    assert [(t.low, t.high) for t in code_tensors(model)] == [(0, 255)]


@pytest.mark.parametrize("scale", [np.inf, np.nan, 0.0])
def test_an_activation_scale_that_is_no_number(tmp_path, scale):
    least = helper.make_node("Max", ["x", "zero"], ["bounded"])
    model = quantized_input(least, source="bounded", zero=np.float32(0), s=np.float32(scale))
    (activation,) = summary_of(model, tmp_path).activations
    assert (activation.low, activation.high) == (0, 255)
    json.dumps(summary_of(model, tmp_path).to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("grid", "kind"), [(("s", "given"), TensorProto.UINT8), (("given", "a"), TensorProto.FLOAT)]
)
def test_a_quantizer_whose_grid_is_computed_is_left_out(grid, kind):
    given = helper.make_tensor_value_info("given", kind, [])
    model = quantized_input(grid=grid, inputs=[given])
    assert code_tensors(model) == ()
    assert saturating_layers(model) == ["q"]  # its input may have any code
