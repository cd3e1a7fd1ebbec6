"""Graph passes on hand-made models: same function, and the form ONNX Runtime runs as integers."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment import onnx_passes
from metaaug_cli.deployment.onnx_movement import move_codes
from metaaug_cli.deployment.ort import count_kernels, open_session


def make_model(nodes, constants, *, shape=(None, 4, 6, 6)):
    """A model from float ``x`` to float ``y``, quantized on entry with scale 0.05 and zero point 128."""
    constants = {"s": np.float32(0.05), "z": np.uint8(128), **constants}
    head = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
    ]
    graph = helper.make_graph(
        [*head, *nodes],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def apply(model, one_pass):
    changed = ir.from_proto(model)
    result = one_pass(changed)
    onnx_passes.remove_unused(changed)
    return ir.to_proto(changed), result


def run(model, x):
    return open_session(model.SerializeToString()).run(None, {"x": x})[0]


X = np.random.default_rng(0).normal(0, 2, (2, 4, 6, 6)).astype(np.float32)
CODES = np.random.default_rng(1).integers(-7, 8, (5, 4, 3, 3)).astype(np.int8)
CONV = {"w": CODES, "ws": np.full(5, 0.02, np.float32), "wz": np.zeros(5, np.int8)}


def conv(x, **attributes):
    return [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", [x, "wd"], ["c"], name="conv", **attributes),
    ]


QUANTIZED_END = [
    helper.make_node("QuantizeLinear", ["c", "s", "z"], ["qc"]),
    helper.make_node("DequantizeLinear", ["qc", "s", "z"], ["y"]),
]
FLOAT_END = [helper.make_node("Identity", ["c"], ["y"])]


def test_zero_padding_moves_into_the_convolution():
    pads = np.array([0, 0, 1, 0, 0, 0, 2, 1])
    pad = helper.make_node("Pad", ["d", "pads"], ["p"])
    model = make_model([pad, *conv("p", pads=[1, 1, 0, 1]), *QUANTIZED_END], {**CONV, "pads": pads})
    folded, count = apply(model, onnx_passes.fold_zero_padding)
    assert count == 1
    assert "Pad" not in {node.op_type for node in folded.graph.node}
    node = next(n for n in folded.graph.node if n.op_type == "Conv")
    assert list(next(a.ints for a in node.attribute if a.name == "pads")) == [2, 1, 2, 2]
    assert np.array_equal(run(model, X), run(folded, X))
    assert count_kernels(folded.SerializeToString()).of("Conv") == (1, 1)


@pytest.mark.parametrize(
    ("pads", "value", "mode"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.5, "constant"),
        ([0, 0, 1, 1, 0, 0, -1, 1], 0.0, "constant"),
        ([0, 1, 1, 1, 0, 0, 1, 1], 0.0, "constant"),
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.0, "reflect"),
    ],
)
def test_other_padding_stays(pads, value, mode):
    constants = {**CONV, "pads": np.array(pads), "value": np.float32(value)}
    if pads[1]:
        constants["w"] = np.concatenate([CODES, CODES[:, :1]], 1)
    pad = helper.make_node("Pad", ["d", "pads", "value"], ["p"], mode=mode)
    model = make_model([pad, *conv("p"), *FLOAT_END], constants)
    folded, count = apply(model, onnx_passes.fold_zero_padding)
    assert count == 0
    assert np.array_equal(run(model, X), run(folded, X))


def test_padding_with_another_reader_stays_for_it():
    pad = helper.make_node("Pad", ["d", "pads"], ["p"])
    pool = helper.make_node("AveragePool", ["p"], ["a"], kernel_shape=[8, 8])
    nodes = [pad, *conv("p"), pool, helper.make_node("ReduceMax", ["c"], ["m"], keepdims=1)]
    add = helper.make_node("Add", ["a", "m"], ["y"])
    model = make_model([*nodes, add], {**CONV, "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])})
    folded, count = apply(model, onnx_passes.fold_zero_padding)
    assert count == 1
    assert "Pad" in {node.op_type for node in folded.graph.node}
    np.testing.assert_allclose(run(model, X), run(folded, X), rtol=1e-5)


def test_a_gemm_needs_its_zero_point_to_run_as_integers():
    codes = np.random.default_rng(2).integers(-100, 100, (3, 4)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.codes", "fc.scale"], ["wd"], axis=0),
        helper.make_node("Gemm", ["d", "wd"], ["y"], transB=1),
    ]
    constants = {"fc.codes": codes, "fc.scale": np.float32([0.1, 0.2, 0.3])}
    model = make_model(nodes, constants, shape=(None, 4))
    completed, _ = apply(model, onnx_passes.add_weight_zero_points)
    names = {i.name: numpy_helper.to_array(i) for i in completed.graph.initializer}
    assert names["fc.zero_point"].dtype == np.int8
    assert names["fc.zero_point"].tolist() == [0, 0, 0]
    assert count_kernels(model.SerializeToString()).of("Gemm") == (0, 1)
    assert count_kernels(completed.SerializeToString()).of("Gemm") == (1, 1)


def test_biases_get_no_zero_point():
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        helper.make_node("Add", ["d", "bd"], ["y"]),
    ]
    model = make_model(nodes, {"b": np.int32([1, 2]), "bs": np.float32([1, 1])}, shape=(None, 2))
    completed, _ = apply(model, onnx_passes.add_weight_zero_points)
    assert {i.name for i in completed.graph.initializer} == {"s", "z", "b", "bs"}


def test_quantizers_give_their_names():
    nodes = [
        helper.make_node("QuantizeLinear", ["d", "act.scale", "z8"], ["v1"]),
        helper.make_node("Clip", ["v1", "low", "high"], ["v2"]),
        helper.make_node("DequantizeLinear", ["v2", "act.scale", "z8"], ["v3"]),
        helper.make_node("QuantizeLinear", ["v3", "act.scale", "z8"], ["v4"]),
        helper.make_node("DequantizeLinear", ["v4", "act.scale", "z8"], ["y"]),
    ]
    bounds = {"low": np.uint8(0), "high": np.uint8(15), "z8": np.uint8(8), "act.scale": np.float32(0.4)}
    model = make_model(nodes, bounds)
    named, _ = apply(model, onnx_passes.name_tensors)
    outputs = [name for node in named.graph.node[2:] for name in node.output]
    assert outputs == ["act.unclipped_codes", "act.codes", "act.values", "act.2.codes", "y"]
    assert {"act.quant_min", "act.quant_max", "act.zero_point"} <= {i.name for i in named.graph.initializer}
    onnx.checker.check_model(named, full_check=True)
    assert np.array_equal(run(model, X), run(named, X))


MOVES = {
    "concat": [helper.make_node("Concat", ["d", "d"], ["m"], axis=1)],
    "split": [helper.make_node("Split", ["d"], ["m", "rest"], axis=1, num_outputs=2)],
    "resize": [helper.make_node("Resize", ["d", "", "twice"], ["m"], mode="nearest")],
    "pad": [helper.make_node("Pad", ["d", "pads"], ["m"])],
    "reflect": [helper.make_node("Pad", ["d", "pads"], ["m"], mode="reflect")],
    "depth_to_space": [helper.make_node("DepthToSpace", ["d"], ["m"], blocksize=2)],
    "gather": [helper.make_node("Gather", ["d", "index"], ["m"], axis=1)],
    "through_transpose": [
        helper.make_node("Transpose", ["d"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("Concat", ["t", "d"], ["m"], axis=2),
    ],
}
MOVE_CONSTANTS = {
    "twice": np.float32([1, 1, 2, 2]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "index": np.array([2, 0, 1]),
}
END = [helper.make_node("Mul", ["m", "two"], ["y"])]


@pytest.mark.parametrize("name", MOVES)
def test_movement_is_done_on_codes(name):
    used = {n for node in MOVES[name] for n in node.input}
    constants = {k: v for k, v in MOVE_CONSTANTS.items() if k in used}
    model = make_model([*MOVES[name], *END], {**constants, "two": np.float32(2)})
    moved, count = apply(model, move_codes)
    assert count == 1
    order = [node.op_type for node in moved.graph.node]
    assert order.index("DequantizeLinear") > order.index(MOVES[name][-1].op_type)
    onnx.checker.check_model(moved, full_check=True)
    assert np.array_equal(run(model, X), run(moved, X))


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Resize", ["d", "", "twice"], ["m"], mode="linear"),
        helper.make_node("Pad", ["d", "pads", "one"], ["m"]),
        helper.make_node("Concat", ["d", "constant"], ["m"], axis=1),
    ],
    ids=lambda node: node.op_type,
)
def test_what_makes_new_values_stays(node):
    constants = {**MOVE_CONSTANTS, "one": np.float32(1), "constant": np.ones((2, 1, 6, 6), np.float32)}
    model = make_model([node, *END], {**constants, "two": np.float32(2)})
    moved, count = apply(model, move_codes)
    assert count == 0
    assert [n.op_type for n in moved.graph.node] == [n.op_type for n in model.graph.node]


def test_a_concatenation_that_is_quantized_again_is_left_to_the_runtime():
    nodes = [*MOVES["concat"], helper.make_node("QuantizeLinear", ["m", "s", "z"], ["qm"])]
    end = helper.make_node("DequantizeLinear", ["qm", "s", "z"], ["y"])
    _, count = apply(make_model([*nodes, end], {}), move_codes)
    assert count == 0


def test_unequal_grids_are_not_joined():
    nodes = [
        helper.make_node("QuantizeLinear", ["d", "s2", "z"], ["q2"]),
        helper.make_node("Clip", ["q2", "z", "top"], ["k2"]),
        helper.make_node("DequantizeLinear", ["k2", "s2", "z"], ["d2"]),
        helper.make_node("Concat", ["d", "d2"], ["m"], axis=1),
    ]
    constants = {"s2": np.float32(0.1), "top": np.uint8(200), "two": np.float32(2)}
    _, count = apply(make_model([*nodes, *END], constants), move_codes)
    assert count == 0
