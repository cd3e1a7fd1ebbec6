"""Packing changes how codes are stored, never what is computed."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment import packing as packing_passes
from metaaug_cli.deployment.onnx_view import code_tensors, weight_tensors
from metaaug_cli.deployment.ort import count_kernels, open_session
from metaaug_cli.deployment.packing import pack, saturating_layers
from metaaug_cli.errors import InputError

BITS = ["W8A8", "W4A4", "W2A4", "W2A2"]


@pytest.fixture
def packed(exported):
    def make(bits, mode, **settings):
        model = onnx.load(exported(bits)[1])
        packing = pack(model, mode, **settings)
        onnx.checker.check_model(model, full_check=True)
        return model, packing

    return make


def logits(model, networks, **settings):
    return open_session(model.SerializeToString(), **settings).run(
        None, {"input": networks.images().numpy()}
    )[0]


def stored_bytes(model):
    return sum(len(i.raw_data) for i in model.graph.initializer if "codes" in i.name)


@pytest.mark.parametrize("bits", BITS)
def test_packed_files_compute_the_same_with_the_same_kernels(packed, networks, bits):
    plain, _ = packed(bits, "int8")
    model, packing = packed(bits, "packed")
    assert packing.session_options == {}
    assert np.array_equal(logits(model, networks), logits(plain, networks))
    assert count_kernels(model.SerializeToString()) == count_kernels(plain.SerializeToString())


@pytest.mark.parametrize(
    ("bits", "opset", "least", "ratio"), [("W4A4", 21, "1.23", 2), ("W2A2", 25, "1.25", 4)]
)
def test_packed_weights_take_their_bits(packed, bits, opset, least, ratio):
    plain, _ = packed(bits, "int8")
    model, packing = packed(bits, "packed")
    assert model.opset_import[0].version == opset
    assert packing.least_onnxruntime == least
    sizes = {i.name: len(i.raw_data) for i in model.graph.initializer}
    before = {i.name: len(i.raw_data) for i in plain.graph.initializer}
    assert sizes["conv1.packed_codes"] * ratio == before["conv1.codes"]
    assert "head.packed_codes" not in sizes  # 8 bits stay as they are
    assert stored_bytes(model) < stored_bytes(plain)


def test_eight_bits_have_nothing_to_pack(packed):
    plain, _ = packed("W8A8", "int8")
    for mode in ("packed", "native"):
        model, packing = packed("W8A8", mode)
        assert model.graph == plain.graph
        assert packing.session_options == {}


@pytest.mark.parametrize("bits", ["W4A4", "W2A4", "W2A2"])
def test_native_types_load_with_their_option(packed, networks, bits):
    plain, _ = packed(bits, "int8")
    model, packing = packed(bits, "native")
    types = {t.name: t.onnx_type for t in weight_tensors(model) if t.kind == "weight"}
    low = {TensorProto.INT4, TensorProto.UINT4} if bits == "W4A4" else {TensorProto.INT2, TensorProto.UINT2}
    assert types["conv1"] in low
    assert types["head"] == TensorProto.INT8
    acts = {t.name: (t.onnx_type, t.low, t.high) for t in code_tensors(model)}
    assert acts["act1"] == ((TensorProto.UINT2, 0, 3) if bits == "W2A2" else (TensorProto.UINT4, 0, 15))
    assert acts["act4"][2] == min(12, acts["act1"][2])  # the absorbed ReLU6 is still a bound
    assert packing.session_options
    got = logits(model, networks, options=packing.session_options)
    wanted = logits(plain, networks)
    assert np.abs(got - wanted).max() < 0.1 * wanted.std()
    assert count_kernels(model.SerializeToString(), options=packing.session_options).of("Conv") == (0, 5)


@pytest.mark.parametrize("bits", ["W4A4", "W2A2"])
def test_default_optimisation_still_refuses_native_types(packed, bits):
    """When this fails the runtime has learnt it, and the session option can go."""
    model, _ = packed(bits, "native")
    with pytest.raises(InputError, match="does not load"):
        open_session(model.SerializeToString())


def test_saturating_layers_follow_from_the_codes(packed):
    assert set(saturating_layers(packed("W8A8", "int8")[0])) == {
        "stem", "conv1", "conv2", "depthwise", "pointwise", "head",
    }  # fmt: skip
    assert set(saturating_layers(packed("W4A4", "int8")[0])) == {"stem", "head"}


@pytest.mark.parametrize("bits", ["W8A8", "W4A4"])
def test_reduced_range_needs_no_option_and_computes_the_same(packed, networks, bits):
    plain, _ = packed(bits, "int8")
    model, _ = packed(bits, "int8", reduce_range=True)
    assert saturating_layers(model) == []
    assert np.array_equal(logits(model, networks), logits(plain, networks))
    assert count_kernels(model.SerializeToString()) == count_kernels(plain.SerializeToString())


@pytest.mark.parametrize(("pair", "saturates"), [((64, 64), False), ((64, 65), True), ((-64, -65), True)])
def test_saturation_bound_of_two_products(pair, saturates):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["fc.codes", "fs", "fz"], ["w"], axis=0),
        helper.make_node("Gemm", ["d", "w"], ["y"], transB=1),
    ]
    constants = {
        "s": np.float32(1), "z": np.uint8(0), "fs": np.ones(1, np.float32), "fz": np.zeros(1, np.int8),
        "fc.codes": np.array([[*pair, 0]], np.int8),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    found = saturating_layers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert found == (["fc"] if saturates else [])  # 255 * 128 = 32640 fits int16, 255 * 129 does not


def linear(codes, *, per_channel=True):
    """A linear layer of float inputs with these int8 codes, (out, in), zero point 0 and scale 1."""
    channels = len(codes) if per_channel else ()
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.codes", "fs", "fz"], ["w"], axis=0),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    constants = {"fc.codes": codes, "fs": np.ones(channels, np.float32), "fz": np.zeros(channels, np.int8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, codes.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, len(codes)])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def weights_of(model):
    """Codes minus zero points as a runtime reads them, and the type they are stored in."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    stored = next(i.data_type for i in model.graph.initializer if i.name.endswith("codes"))
    for node in model.graph.node:
        if node.op_type == "Cast":
            constants[node.output[0]] = constants[node.input[0]].astype(np.int8)
        if node.op_type == "Sub":
            constants[node.output[0]] = constants[node.input[0]] - constants[node.input[1]]
    codes, zero_point = constants["fc.codes"], constants["fz"]
    assert zero_point.dtype == codes.dtype  # ONNX wants one type for both
    return codes.astype(np.int32) - zero_point.astype(np.int32).reshape(-1, 1), stored


@st.composite
def grid_codes(draw):
    """Codes of a layer with 1 to 8 bits and a zero point per channel, absorbed as deployment does."""
    bits, channels, width = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    grid = st.integers(0, 2**bits - 1)
    raw = draw(arrays(np.int32, (channels, width), elements=grid))
    zero_points = draw(arrays(np.int32, (channels, 1), elements=grid))
    return bits, np.clip(raw - zero_points, -128, 127).astype(np.int8)


BITS_OF = {
    TensorProto.INT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["packed", "packed4", "native"])
@given(layer=grid_codes(), per_channel=st.booleans())
def test_any_codes_are_the_same_in_every_form(mode, layer, per_channel):
    bits, codes = layer
    model = linear(codes, per_channel=per_channel)
    pack(model, mode)
    weights, stored = weights_of(model)
    assert np.array_equal(weights, codes)
    if codes.any() and per_channel:
        assert BITS_OF[stored] <= next(b for b in (2, 4, 8) if b >= bits) or mode == "packed4"
    assert mode != "packed4" or BITS_OF[stored] >= 4


@given(codes=arrays(np.int8, st.tuples(st.integers(1, 3), st.integers(1, 3))))
def test_any_int8_codes_are_the_same_in_every_form(codes):
    for mode in ("packed", "packed4", "native"):
        model = linear(codes)
        pack(model, mode)
        assert np.array_equal(weights_of(model)[0], codes)


@pytest.mark.parametrize("mode", ["packed", "packed4", "native"])
@pytest.mark.parametrize(
    ("codes", "stored"),
    [
        ([[127], [127]], "int8"),  # a batch norm: one code per channel
        ([[127], [-128]], "int8"),
        ([[100, 101], [101, 102]], "int8"),
        ([[0], [0]], "int8"),  # a dead layer
        ([[7], [7]], "4"),
        ([[7], [-8]], "4"),
        ([[12, 15], [-15, -12]], "4"),
        ([[3], [3]], "2"),
        ([[1], [-2]], "2"),
        ([[0, 0], [1, 0]], "2"),
    ],
)
def test_few_codes_take_the_bits_of_their_grid(mode, codes, stored):
    codes = np.array(codes, np.int8)
    model, plain = linear(codes), linear(codes)
    pack(model, mode)
    onnx.checker.check_model(model, full_check=True)
    weights, kind = weights_of(model)
    assert np.array_equal(weights, codes)
    if stored == "int8":
        assert model == plain
    else:
        assert BITS_OF[kind] == (4 if mode == "packed4" else int(stored))


def test_codes_outside_their_type_are_never_written():
    for values, dtype in (([127], ml_dtypes.uint2), ([-1], ml_dtypes.uint4), ([8], ml_dtypes.int4)):
        with pytest.raises(AssertionError, match=r"fc\.codes does not fit"):
            packing_passes._constant(np.array(values), dtype, "fc.codes")


def test_two_bits_in_four_compute_the_same_with_the_same_kernels(packed, networks):
    plain, _ = packed("W2A2", "int8")
    model, packing = packed("W2A2", "packed4")
    assert (packing.mode, packing.least_onnxruntime) == ("packed", "1.23")
    assert np.array_equal(logits(model, networks), logits(plain, networks))
    assert count_kernels(model.SerializeToString()) == count_kernels(plain.SerializeToString())


def test_a_weight_that_nobody_reads_cannot_saturate():
    model = linear(np.full((2, 3), 127, np.int8))
    assert saturating_layers(model) == ["fc"]
    del model.graph.node[1]
    assert saturating_layers(model) == []


def test_symmetric_weights_take_the_signed_type():
    model = linear(np.array([[-8, 7, 0], [-3, 2, 1]], np.int8))
    pack(model, "native")
    (weight,) = weight_tensors(model)
    assert (weight.onnx_type, weight.symmetric, weight.bits) == (TensorProto.INT4, True, 4)
