"""The integer reference against ONNX Runtime and against hand-made numbers."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment.integer_ops import HANDLERS, Codes
from metaaug_cli.deployment.ort import open_session
from metaaug_cli.deployment.packing import pack
from metaaug_cli.verification import reference_ops
from metaaug_cli.verification.codes import RuntimeCodes
from metaaug_cli.verification.reference import IntegerExecutor


def mismatches(path, images):
    runtime = RuntimeCodes(path)
    logits, codes = runtime.run(images)
    resumed = {t.name: codes[t.name] for t in runtime.tensors if not t.exact}
    exact_logits, exact = IntegerExecutor(runtime.model).run(images, forced=resumed)
    assert exact.keys() == codes.keys()
    differing = {name: int((exact[name] != codes[name]).sum()) for name in codes}
    return logits, exact_logits, {n: c for n, c in differing.items() if c}, runtime


@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A4", "W2A2"])
def test_every_code_is_the_runtimes(exported, networks, bits):
    logits, exact, differing, runtime = mismatches(exported(bits)[1], networks.images(48, seed=1).numpy())
    assert differing == {}
    np.testing.assert_allclose(exact, logits, rtol=1e-6, atol=1e-7)
    assert runtime.disturbance == 0.0


def test_every_code_of_every_integer_pattern(exported, networks):
    for pattern in networks.INTEGER_PATTERNS:
        _, _, differing, _ = mismatches(exported(pattern)[1], networks.images(32, seed=2).numpy())
        assert differing == {}, pattern.__name__


def test_layers_after_float_operators_stay_exact(exported, networks):
    for pattern in networks.FLOAT_PATTERNS:
        _, _, differing, runtime = mismatches(exported(pattern)[1], networks.images(32, seed=3).numpy())
        exact = {t.name for t in runtime.tensors if t.exact}
        assert exact & differing.keys() == set(), pattern.__name__
        assert len(exact) >= 3
        assert sum(differing.values()) <= 3


@pytest.mark.parametrize("mode", ["packed", "native"])
def test_packed_codes_are_unpacked(exported, networks, mode):
    images = networks.images(4).numpy()
    model = onnx.load(exported("W2A4")[1])
    wanted, codes = IntegerExecutor(model).run(images)
    pack(model, mode)
    got, again = IntegerExecutor(model).run(images)
    assert np.array_equal(got, wanted)
    assert all(np.array_equal(codes[name], again[name].astype(np.uint8)) for name in codes)


def tiny_convolution(out_scale):
    """x in steps of 0.5 (zero point 2) through weights (3, -1) of step 0.25 and bias 5: acc = 3a - b + 5."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x.codes"]),
        helper.make_node("DequantizeLinear", ["x.codes", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        helper.make_node("Conv", ["d", "wd", "bd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "so", "zo"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["y.codes"]),
        helper.make_node("DequantizeLinear", ["y.codes", "so", "zo"], ["y"]),
    ]
    constants = {
        "s": np.float32(0.5), "z": np.uint8(2), "w": np.array([[[[3]], [[-1]]]], np.int8),
        "ws": np.float32([0.25]), "wz": np.int8([0]), "b": np.int32([5]), "bs": np.float32([0.125]),
        "so": np.float32(out_scale), "zo": np.uint8(1), "low": np.uint8(0), "high": np.uint8(15),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1, 1, 1])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_hand_made_convolution():
    x = np.float32([[1.0, -1.0], [0.26, 0.0], [-9.0, 9.0], [9.0, 0.0]]).reshape(4, 2, 1, 1)
    _, codes = IntegerExecutor(tiny_convolution(0.25)).run(x)
    assert codes["x"].reshape(4, 2).tolist() == [[4, 0], [3, 2], [0, 20], [20, 2]]
    # acc = 3a - b + 5 of centred codes: 13, 8, -19, 59; times 0.125 / 0.25, half to even, plus 1, in 0..15
    assert codes["y"].reshape(-1).tolist() == [7, 5, 0, 15]


def test_forced_codes_replace_the_computed_ones():
    x = np.zeros((1, 2, 1, 1), np.float32)
    forced = {"x": np.uint8([4, 0]).reshape(1, 2, 1, 1)}
    _, codes = IntegerExecutor(tiny_convolution(0.25)).run(x, forced=forced)
    assert codes["x"].reshape(-1).tolist() == [2, 2]  # what it computed
    assert codes["y"].item() == 7  # what followed from the forced ones


@pytest.mark.parametrize(("largest", "dtype"), [(15, torch.float32), (127, torch.float64)])
def test_sums_are_exact_in_the_type_that_is_chosen(monkeypatch, largest, dtype):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (16, 64, 6, 6)).astype(np.float64)
    weight = generator.integers(-largest, largest + 1, (8, 64, 3, 3)).astype(np.float64)
    weight[0] = largest
    monkeypatch.setattr(reference_ops.platform, "machine", lambda: "x86_64")
    used = []
    plain = reference_ops._convolve
    monkeypatch.setattr(
        reference_ops, "_convolve", lambda x, *rest: (used.append(x.dtype), plain(x, *rest))[1]
    )
    total = reference_ops._exact_convolution(x, weight, {"pads": [1, 1, 1, 1]})
    wanted = F.conv2d(torch.from_numpy(x).long(), torch.from_numpy(weight).long(), padding=1)
    assert used == [dtype]
    assert np.array_equal(total, wanted.numpy())


POOLS = [
    ({"kernel_shape": [2, 2], "strides": [2, 2]}, {"kernel_size": 2}),
    (
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    (
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ),
]


@pytest.mark.parametrize(("onnx_form", "torch_form"), POOLS)
def test_pools_agree_with_torch(onnx_form, torch_form):
    x = torch.randn(2, 3, 8, 10)
    node = helper.make_node("MaxPool", ["x"], ["y"], **onnx_form)
    assert np.array_equal(reference_ops.max_pool(node, x.numpy()), F.max_pool2d(x, **torch_form).numpy())
    average = F.avg_pool2d(x, **torch_form, count_include_pad=False)
    got = reference_ops._float_average_pool(x.numpy(), reference_ops.attributes(node))
    np.testing.assert_allclose(got, average.numpy(), rtol=1e-5, atol=1e-6)


def test_average_pool_may_count_its_padding():
    x = torch.randn(1, 2, 5, 5)
    node = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1
    )
    got = reference_ops._float_average_pool(x.numpy(), reference_ops.attributes(node))
    np.testing.assert_allclose(got, F.avg_pool2d(x, 3, 1, 1).numpy(), rtol=1e-5, atol=1e-6)


def binary_model(op, grids, shapes):
    """Codes a and b through one quantized operator to codes y, with (scale, zero point) of a, b and y."""
    constants = {}
    for name, (scale, zero_point) in zip("aby", grids, strict=True):
        constants |= {f"s{name}": np.float32(scale), f"z{name}": np.uint8(zero_point)}
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "sa", "za"], ["af"]),
        helper.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bf"]),
        helper.make_node(op, ["af", "bf"], ["yf"]),
        helper.make_node("QuantizeLinear", ["yf", "sy", "zy"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "binary",
        [helper.make_tensor_value_info(n, TensorProto.UINT8, s) for n, s in zip("ab", shapes, strict=True)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None] * 4)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return open_session(model.SerializeToString(), threads=1)


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("shape", ["equal", "second", "first"])
def test_borders_between_codes_go_the_same_way(op, shape):
    """Scales that are powers of two, or equal, put many results exactly between two codes."""
    generator = np.random.default_rng(0)
    codes = np.arange(256, dtype=np.uint8)
    a = np.broadcast_to(codes, (1, 256, 1, 256)).reshape(1, 256, 1, 256)
    b = codes.reshape(1, 256, 1, 1)
    b = np.broadcast_to(b, a.shape) if shape == "equal" else b
    pair = (b, a) if shape == "first" else (a, b)
    pair = tuple(np.ascontiguousarray(part) for part in pair)
    for trial in range(12):
        scales = np.exp2(generator.integers(-8, -2, 2)) if trial % 2 else generator.uniform(0.01, 0.2, 2)
        out = 2.0 * scales.max() if op == "Add" else scales.prod() * 128
        zeros = generator.choice([0, 8, 122, 128], 3)
        grids = list(zip([*scales, out], zeros, strict=True))
        wanted = binary_model(op, grids, [part.shape for part in pair]).run(
            None, dict(zip("ab", pair, strict=True))
        )
        (scale_y, zero_y) = np.float32(out), int(zeros[2])

        operands = [
            reference_ops.Quantized(part, np.asarray(np.float32(s)), np.asarray(int(z)), 0)
            for part, (s, z) in zip(pair, grids[:2], strict=True)
        ]
        handler = {"Add": reference_ops.add, "Mul": reference_ops.multiply}[op]
        got = handler(None, operands).to_codes(scale_y, zero_y).clip(0, 255)
        assert np.array_equal(got, wanted[0]), (trial, grids)

        tensors = [
            Codes(torch.from_numpy(part).float(), torch.tensor(np.float32(s)), int(z))
            for part, (s, z) in zip(pair, grids[:2], strict=True)
        ]
        simulated = HANDLERS[{"Add": torch.ops.aten.add.Tensor, "Mul": torch.ops.aten.mul.Tensor}[op]](
            *tensors
        )
        _, rounded = simulated.requantize(torch.tensor(scale_y), zero_y)
        assert np.array_equal(rounded.clamp(0, 255).numpy(), wanted[0]), (trial, grids)


GROUPED = {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes"),
    [
        ("GroupNormalization", [(4,), (4,)], {"num_groups": 2, "epsilon": 1e-3}),
        ("ConvTranspose", [(4, 3, 4, 4), (6,)], GROUPED),
        ("ConvTranspose", [(4, 2, 3, 3)], {"dilations": [2, 1]}),
    ],
)
def test_float_operators_that_the_onnx_evaluator_gets_wrong(operator, shapes, attributes):
    images = torch.randn(2, 4, 7, 5).numpy()
    weights = [numpy_helper.from_array(torch.randn(s).numpy(), f"w{i}") for i, s in enumerate(shapes)]
    node = helper.make_node(operator, ["x", *(w.name for w in weights)], ["y"], **attributes)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in "xy")
    graph = helper.make_graph([node], "one", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": images})
    found, _ = IntegerExecutor(model).run(images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
