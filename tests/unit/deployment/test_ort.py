"""What ONNX Runtime runs as integers, and the traps that the exported form avoids.

The traps are tested so that a release which behaves differently is noticed.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment import ort
from metaaug_cli.deployment.onnx_summary import load_onnx
from metaaug_cli.deployment.ort import (
    EXACT_OPTION,
    KernelCount,
    count_kernels,
    needs_exact_option,
    open_session,
)
from metaaug_cli.errors import InputError, MetaAugError

CONSTANTS = {
    "s": np.float32(0.05),
    "z": np.uint8(128),
    "so": np.float32(0.07),
    "zo": np.uint8(0),
    "w": np.random.default_rng(0).integers(-100, 100, (4, 4, 1, 1)).astype(np.int8),
    "ws": np.full(4, 0.01, np.float32),
    "wz": np.zeros(4, np.int8),
    "b": np.arange(4, dtype=np.int32),
    "bs": np.float32(0.05) * np.full(4, 0.01, np.float32),
    "fb": np.ones(4, np.float32) / 3,
    "fc": np.random.default_rng(1).integers(-100, 100, (4, 4)).astype(np.int8),
    "shape": np.array([0, 4]),
    "axes": np.array([2, 3]),
}


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=f"{op} of {output}", **attributes)


def q(name, output, scale="so", zero_point="zo"):
    """QuantizeLinear and DequantizeLinear from tensor ``name`` to ``output``."""
    grid = [scale, zero_point]
    return [
        node("QuantizeLinear", [name, *grid], f"{output}_q"),
        node("DequantizeLinear", [f"{output}_q", *grid], output),
    ]


INPUT = q("x", "d", "s", "z")
WEIGHT = node("DequantizeLinear", ["w", "ws", "wz"], "wd", axis=0)
BIAS = node("DequantizeLinear", ["b", "bs"], "bd", axis=0)
FC = node("DequantizeLinear", ["fc", "ws", "wz"], "fd", axis=0)
CONV = [WEIGHT, BIAS, node("Conv", ["d", "wd", "bd"], "c")]
POOLED = [node("GlobalAveragePool", ["d"], "g"), *q("g", "gd")]
GEMM = [FC, node("Gemm", ["flat", "fd"], "y", transB=1)]


def make_model(*nodes, rank=4):
    used = {name for n in nodes for name in n.input}
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in CONSTANTS.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


INTEGER = {
    "conv": [*CONV, *q("c", "y")],
    "conv, relu": [*CONV, node("Relu", ["c"], "r"), *q("r", "y")],
    "residual add": [*CONV, *q("c", "cd"), node("Add", ["cd", "d"], "a"), *q("a", "y")],
    "mul": [*CONV, *q("c", "cd"), node("Mul", ["cd", "d"], "a"), *q("a", "y")],
    "concat": [*CONV, *q("c", "cd"), node("Concat", ["cd", "d"], "a", axis=1), *q("a", "y")],
    "max pool without quantizer": [
        node("MaxPool", ["d"], "p", kernel_shape=[2, 2]),
        WEIGHT,
        node("Conv", ["p", "wd"], "c"),
        *q("c", "y"),
    ],
    "average pool": [node("AveragePool", ["d"], "p", kernel_shape=[2, 2]), *q("p", "y")],
    "sigmoid": [node("Sigmoid", ["d"], "p"), *q("p", "y")],
    "global pool": [*POOLED[:-2], *q("g", "y")],
}
FLOAT = {
    "conv without output quantizer": ([*CONV, node("Identity", ["c"], "y")], "Conv"),
    "relu before a signed grid": (
        [*CONV, node("Relu", ["c"], "r"), *q("r", "y", "so", "z")],
        "Conv",
    ),
    "two quantizers on one conv": (
        [*CONV, *q("c", "c1"), *q("c", "c2", "s", "z"), node("Add", ["c1", "c2"], "a"), *q("a", "y")],
        "Conv",
    ),
    "concat without quantizer": (
        [node("Concat", ["d", "d"], "a", axis=1), node("Identity", ["a"], "y")],
        "Concat",
    ),
    "mean": ([node("ReduceMean", ["d", "axes"], "g", keepdims=1), *q("g", "y")], "ReduceMean"),
}


@pytest.mark.parametrize("name", INTEGER)
def test_patterns_that_are_exported_run_as_integers(name):
    kernels = count_kernels(make_model(*INPUT, *INTEGER[name]))
    assert kernels.float_nodes == ()
    assert sum(kernels.integer.values()) >= 1


@pytest.mark.parametrize("name", FLOAT)
def test_traps_still_fall_back_to_float(name):
    nodes, kind = FLOAT[name]
    kernels = count_kernels(make_model(*INPUT, *nodes))
    assert kernels.floating[kind] == 1
    assert any(text.startswith(kind) for text in kernels.float_nodes)


@pytest.mark.parametrize("half", [b"", b"\x08"])
def test_no_room_for_the_graph_is_not_blamed_on_the_file(monkeypatch, half):
    def full(*arguments, save_optimized=None, before=open_session, **options):
        if save_optimized is not None:
            save_optimized.write_bytes(half)
            if not half:
                raise InputError("ONNX Runtime does not load the model: INVALID_PROTOBUF")
        return before(*arguments, **options)

    monkeypatch.setattr(ort, "open_session", full)
    with pytest.raises(MetaAugError, match="cannot write its graph into") as caught:
        count_kernels(make_model(*INPUT, *INTEGER["conv"]))
    assert "TMPDIR" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("move", "integer"), [("Reshape", 1), ("Flatten", 0)])
def test_only_a_reshape_lets_the_head_be_integer(move, integer):
    inputs = ["gd", "shape"] if move == "Reshape" else ["gd"]
    model = make_model(*INPUT, *POOLED, node(move, inputs, "flat"), *GEMM, rank=2)
    assert count_kernels(model).of("Gemm") == (integer, 1)


def with_constants(model, **constants):
    changed = onnx.ModelProto.FromString(model)
    for initializer in changed.graph.initializer:
        if initializer.name in constants:
            initializer.CopyFrom(numpy_helper.from_array(constants[initializer.name], initializer.name))
    return changed.SerializeToString()


def test_a_float_bias_is_rounded_silently():
    """The coarser the grid of the bias, as at low bits, the more codes change; an int32 bias is exact."""
    low = {"w": np.sign(CONSTANTS["w"]).astype(np.int8), "ws": np.full(4, 0.2, np.float32)}
    low |= {"bs": np.float32(0.05) * low["ws"], "so": np.float32(0.0633)}
    x = np.random.default_rng(2).normal(0, 2, (64, 4, 5, 5)).astype(np.float32)

    def changed_codes(model):
        outputs = [open_session(model, optimize=level).run(None, {"x": x})[0] for level in ("all", "none")]
        return float((np.abs(outputs[0] - outputs[1]) > 0.5 * low["so"]).mean())

    float_bias = [WEIGHT, node("Conv", ["d", "wd", "fb"], "c"), *q("c", "y")]
    assert changed_codes(with_constants(make_model(*INPUT, *float_bias), **low)) > 0.01
    assert changed_codes(with_constants(make_model(*INPUT, *CONV, *q("c", "y")), **low)) == 0


def test_two_grids_in_a_row_are_merged_lossily():
    x = np.random.default_rng(3).uniform(-3, 3, (8, 4, 5, 5)).astype(np.float32)
    data = with_constants(make_model(*INPUT, *q("d", "y")), so=np.float32(0.31))
    merged = open_session(data).run(None, {"x": x})[0]
    exact = open_session(data, optimize="none").run(None, {"x": x})[0]
    assert not np.allclose(merged, exact, atol=1e-3)
    switched_off = open_session(data, options={"session.disable_double_qdq_remover": "1"})
    np.testing.assert_allclose(switched_off.run(None, {"x": x})[0], exact, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 64])
def test_a_file_that_does_not_load_is_an_input_error(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"does not load .*broken.onnx"):
        open_session(path)


def test_weights_that_are_not_beside_the_file_are_named(tmp_path):
    weight = numpy_helper.from_array(np.ones((5, 12), np.float32), "w")
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    ends = [helper.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 12), ("y", 5))]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight]), ir_version=8)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert open_session(path).run(None, {"x": np.ones((1, 12), np.float32)})[0].tolist() == [[12.0] * 5]
    assert load_onnx(path).graph.initializer[0].raw_data
    (tmp_path / "weights.bin").unlink()
    for read in (open_session, load_onnx):
        with pytest.raises(InputError, match=r"keeps its weights in weights\.bin, which is not beside it"):
            read(path)


CPUS = {
    "flags\t\t: fpu sse2 avx2\n": True,
    "flags\t\t: fpu avx2 avx512_vnni\n": False,
    "flags\t\t: fpu avx2 avx_vnni\n": False,
    "no such line\n": True,
}


@pytest.mark.parametrize(("text", "needed"), CPUS.items())
def test_cpus_without_vnni_get_the_exact_kernels(monkeypatch, text, needed):
    monkeypatch.setattr(ort.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert needs_exact_option() is needed
    session = open_session(make_model(*INPUT, *INTEGER["conv"]))
    options = session.get_session_options()
    if needed:
        assert options.get_session_config_entry(EXACT_OPTION) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(EXACT_OPTION)


def test_unreadable_cpu_flags_are_taken_for_the_worst(monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr(ort.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(Path, "read_text", fail)
    assert needs_exact_option() is True
    monkeypatch.setattr(ort.platform, "machine", lambda: "arm64")
    assert needs_exact_option() is False


def test_counts_add_up():
    count = KernelCount(
        {"Conv": 3, "Add": 1}, {"Conv": 1, "Softmax": 2}, ("Conv a", "Softmax b", "Softmax c")
    )
    assert count.of("Conv") == (3, 4)
    assert count.of("Conv", "Add") == (4, 5)
    assert count.of("Gemm") == (0, 0)
    assert count.of() == (4, 7)
    assert count.to_dict()["float_nodes"] == ["Conv a", "Softmax b", "Softmax c"]
