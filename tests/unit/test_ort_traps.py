"""ONNX Runtime's behaviour that shapes the exported form; beside the traps of ``test_ort.py``.

Each test fails when a release behaves differently: then a rule of the export can be relaxed.
"""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment.ort import classify_nodes, open_session, optimized_graph
from metaaug_cli.deployment.runtimes import WITHOUT_INTEGER_KERNELS
from metaaug_cli.errors import InputError

CHANNELS = 4
RNG = np.random.default_rng(0)
# No round numbers: they would put many values on the border between two codes.
SCALES = {"s": np.float32(0.0517), "so": np.float32(0.0731), "ws": np.full(CHANNELS, 0.0113, np.float32)}
ZEROS = {"z": np.uint8(128), "zo": np.uint8(0), "wz": np.zeros(CHANNELS, np.int8)}
WEIGHT = {"w": RNG.integers(-100, 100, (CHANNELS, CHANNELS, 1, 1)).astype(np.int8)}
IMAGES = RNG.normal(0, 2, (8, CHANNELS, 6, 6)).astype(np.float32)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=f"{op} of {output}", **attributes)


def pair(name, output, scale="so", zero_point="zo"):
    """QuantizeLinear and DequantizeLinear from tensor ``name`` to ``output``."""
    codes = f"{output}_q"
    return [
        node("QuantizeLinear", [name, scale, zero_point], codes),
        node("DequantizeLinear", [codes, scale, zero_point], output),
    ]


def build(*nodes, rank=4, opset=21, ir_version=10, **constants):
    known = {**SCALES, **ZEROS, **WEIGHT, **constants}
    used = {name for n in nodes for name in n.input}
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, *IMAGES.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in known.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def kernels(data):
    return classify_nodes(optimized_graph(data))


def outputs(data, **settings):
    return open_session(data, threads=1, **settings).run(None, {"x": IMAGES})[0]


INPUT = pair("x", "d", "s", "z")
DEQUANTIZED = node("DequantizeLinear", ["w", "ws", "wz"], "wd", axis=0)
CONV = [*INPUT, DEQUANTIZED, node("Conv", ["d", "wd"], "c")]


@pytest.mark.parametrize(("highest", "integer"), [(100.0, 1), (0.5, 0)])
def test_a_clip_that_bites_keeps_the_conv_in_float(highest, integer):
    """Why an absorbed ReLU6 is a bound of the codes and not a Clip of the values."""
    clip = node("Clip", ["c", "low", "high"], "r")
    bounds = {"low": np.float32(0), "high": np.float32(highest)}
    assert kernels(build(*CONV, clip, *pair("r", "y"), **bounds)).of("Conv") == (integer, 1)


def test_a_clip_of_codes_does_not():
    codes = [node("QuantizeLinear", ["c", "so", "zo"], "q"), node("Clip", ["q", "low", "high"], "k")]
    back = node("DequantizeLinear", ["k", "so", "zo"], "y")
    data = build(*CONV, *codes, back, low=np.uint8(0), high=np.uint8(15))
    assert kernels(data).of("Conv") == (1, 1)
    np.testing.assert_array_equal(outputs(data), outputs(data, optimize="none"))
    assert outputs(data).max() <= 15 * SCALES["so"] * 1.0001


@pytest.mark.parametrize(("factor", "integer"), [(1, 1), (2, 0)])
def test_an_int32_bias_must_have_the_scale_of_the_products(factor, integer):
    bias = node("DequantizeLinear", ["b", "bs"], "bd", axis=0)
    scale = (SCALES["s"] * SCALES["ws"] * np.float32(factor)).astype(np.float32)
    nodes = [*INPUT, DEQUANTIZED, bias, node("Conv", ["d", "wd", "bd"], "c"), *pair("c", "y")]
    data = build(*nodes, b=np.arange(CHANNELS, dtype=np.int32), bs=scale)
    assert kernels(data).of("Conv") == (integer, 1)


def test_a_transposed_convolution_has_no_integer_kernel():
    data = build(*INPUT, DEQUANTIZED, node("ConvTranspose", ["d", "wd"], "c"), *pair("c", "y"))
    assert kernels(data).of("ConvTranspose") == (0, 1)


@pytest.mark.parametrize("op", ["HardSwish", "HardSigmoid"])
def test_float_islands_leave_their_neighbours_integer(op):
    second = [node("Conv", ["v", "wd"], "e"), *pair("e", "y")]
    found = kernels(build(*CONV, *pair("c", "f"), node(op, ["f"], "h"), *pair("h", "v"), *second))
    assert found.of("Conv") == (2, 2)
    assert any(op in name or "Hard" in name for name in found.float_nodes)


def test_a_4_bit_weight_type_keeps_the_conv_in_float():
    low = {"w": (WEIGHT["w"] // 16).astype(ml_dtypes.int4), "wz": np.zeros(CHANNELS, ml_dtypes.int4)}
    data = build(*CONV, *pair("c", "y"), **low)
    assert kernels(data).of("Conv") == (0, 1)
    np.testing.assert_allclose(outputs(data), outputs(data, optimize="none"), atol=1e-5)


def test_the_same_codes_unpacked_by_cast_and_sub_are_integer():
    codes = (WEIGHT["w"] // 16).astype(np.int8)
    unpack = [
        node("Cast", ["w4", ], "wu", to=TensorProto.INT8),
        node("Sub", ["wu", "offset"], "w8"),
        node("DequantizeLinear", ["w8", "ws", "wz"], "wd", axis=0),
    ]  # fmt: skip
    packed = {"w4": (codes + 8).astype(ml_dtypes.uint4), "offset": np.full((CHANNELS, 1, 1, 1), 8, np.int8)}
    data = build(*INPUT, *unpack, node("Conv", ["d", "wd"], "c"), *pair("c", "y"), **packed)
    assert kernels(data).of("Conv") == (1, 1)
    np.testing.assert_array_equal(outputs(data), outputs(build(*CONV, *pair("c", "y"), w=codes)))


def refused_by_default():
    four = {"z": ml_dtypes.uint4(8)}
    pool = [*INPUT, node("MaxPool", ["d"], "p", kernel_shape=[2, 2]), *pair("p", "y", "s", "z")]
    two = {
        "w": np.clip(WEIGHT["w"] // 64, -2, 1).astype(ml_dtypes.int2),
        "wz": np.zeros(CHANNELS, ml_dtypes.int2),
    }
    return {
        "4-bit max pool": build(*pool, **four),
        "2-bit weight": build(*CONV, *pair("c", "y"), opset=25, ir_version=13, **two),
    }


@pytest.mark.parametrize("name", ["4-bit max pool", "2-bit weight"])
def test_low_bit_types_are_refused_without_their_option(name):
    data = refused_by_default()[name]
    with pytest.raises(InputError, match="does not load"):
        open_session(data, threads=1)
    exact = outputs(data, optimize="none")
    np.testing.assert_allclose(outputs(data, options=WITHOUT_INTEGER_KERNELS), exact, atol=1e-5)


def test_2_bit_columns_not_a_multiple_of_four_come_out_wrong_in_a_matmul():
    """Why linear layers are exported as Gemm with transposed weights."""
    classes = 10
    codes = RNG.integers(-2, 2, (CHANNELS, classes)).astype(np.int8)
    data = {"m": codes.astype(ml_dtypes.int2), "ms": np.full(classes, 0.1, np.float32)}
    data |= {"mz": np.zeros(classes, ml_dtypes.int2), "shape": np.array([-1, CHANNELS])}
    flat = node("Reshape", ["x", "shape"], "f")
    wide = node("DequantizeLinear", ["m", "ms", "mz"], "md", axis=1)
    matmul = build(flat, wide, node("MatMul", ["f", "md"], "y"), rank=2, opset=25, ir_version=13, **data)
    exact = outputs(matmul, optimize="none")
    wrong = np.abs(outputs(matmul) - exact).max() / np.abs(exact).max()
    assert wrong > 0.1

    tall = node("DequantizeLinear", ["m", "ms", "mz"], "md", axis=0)
    gemm = node("Gemm", ["f", "md"], "y", transB=1)
    data["m"] = np.ascontiguousarray(codes.T).astype(ml_dtypes.int2)
    transposed = build(flat, tall, gemm, rank=2, opset=25, ir_version=13, **data)
    np.testing.assert_allclose(outputs(transposed), exact, atol=1e-4)
