"""Packing changes how codes are stored, never what is computed."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

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


def test_symmetric_weights_take_the_signed_type():
    codes = np.array([[-8, 7, 0], [-3, 2, 1]], np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.codes", "fs", "fz"], ["w"], axis=0),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    constants = {"fc.codes": codes, "fs": np.ones(2, np.float32), "fz": np.zeros(2, np.int8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    pack(model, "native")
    (weight,) = weight_tensors(model)
    assert (weight.onnx_type, weight.symmetric, weight.bits) == (TensorProto.INT4, True, 4)
