"""Exported files run in ONNX Runtime as integers and give the codes that were simulated."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import read_manifest
from metaaug_cli.deployment.ort import count_kernels, open_session
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import GraphError, InputError, UsageError

INTEGER_KINDS = {"Conv": 5, "Add": 1, "MaxPool": 1, "GlobalAveragePool": 1, "Gemm": 1}


@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A4", "W2A2"])
def test_every_operator_is_an_integer_kernel(exported, bits):
    kernels = count_kernels(exported(bits)[1])
    assert kernels.integer == INTEGER_KINDS
    assert kernels.float_nodes == ()
    assert kernels.of() == (9, 9)


@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A4", "W2A2"])
def test_logits_are_the_simulated_ones(exported, networks, bits):
    graph, path = exported(bits)
    images = networks.images()
    (logits,) = open_session(path).run(None, {"input": images.numpy()})
    simulated = IntegerSimulation(graph)(images)
    np.testing.assert_allclose(simulated.numpy(), logits, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        eager = graph(images)  # float arithmetic: the same function up to codes on a border
    assert np.abs(eager.numpy() - logits).max() < 0.1 * logits.std()


def test_file_form(exported):
    model = onnx.load(exported("W4A4")[1])
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version, len(model.opset_import)) == (10, 21, 1)
    assert not model.functions
    assert [i.name for i in model.graph.input] == ["input"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    types = {i.name: i.data_type for i in model.graph.initializer}
    assert types["conv1.codes"] == onnx.TensorProto.INT8
    assert types["conv1.bias_codes"] == onnx.TensorProto.INT32
    assert not any("stack_trace" in entry.key for node in model.graph.node for entry in node.metadata_props)


def test_names_follow_quantizers_and_layers(exported):
    model = onnx.load(exported("W4A4")[1])
    layers = {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    assert layers == {"stem", "conv1", "conv2", "depthwise", "pointwise", "head"}
    outputs = {name for node in model.graph.node for name in node.output}
    quantizers = ["input", "act1", "act2", "branch", "act3", "act4", "act5", "pooled"]
    assert {f"{name}.codes" for name in quantizers} <= outputs
    scales = {i.name for i in model.graph.initializer}
    assert {"act1.scale", "act2.scale"} <= scales  # equal values, yet two quantizers


def test_low_bits_are_clipped_in_the_container(exported):
    model = onnx.load(exported("W4A4")[1])
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    assert constants["act1.quant_max"] == 15
    assert constants["act4.quant_max"] == 12  # an absorbed ReLU6
    assert "act5.quant_max" not in constants  # 8 bits fill the container
    assert np.abs(constants["conv1.codes"]).max() <= 15


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batch_is_free(exported, networks, batch):
    (logits,) = open_session(exported("W2A2")[1]).run(None, {"input": networks.images(batch).numpy()})
    assert logits.shape == (batch, 10)


def test_manifest_is_in_the_file(exported, manifest):
    stored = read_manifest(onnx.load(exported("W4A4")[1]))
    assert stored.packing.mode == "int8"
    assert stored.packing.least_onnxruntime == "1.20"
    assert stored.model_copy(update={"packing": manifest.packing}) == manifest


def test_same_network_same_bytes(exported, networks, manifest, tmp_path):
    graph, path = exported("W2A4")
    again = export_onnx(graph, input_size=networks.SIZE, path=tmp_path / "again.onnx", manifest=manifest)
    assert again.path.read_bytes() == path.read_bytes()
    assert again.size_bytes == path.stat().st_size


def test_sizes_are_reported(networks, manifest, tmp_path):
    result = export_onnx(
        networks.Residual(8, 8), input_size=networks.SIZE, path=tmp_path / "m.onnx", manifest=manifest
    )
    weights = 8 * 3 * 9 + 2 * 8 * 8 * 9 + 8 * 9 + 12 * 8 + 12 * 10
    biases = 8 + 8 + 8 + 8 + 10
    assert result.float_bytes == 4 * (weights + biases)


def test_patterns_run_as_integers(exported, networks):
    for pattern in networks.INTEGER_PATTERNS:
        assert count_kernels(exported(pattern)[1]).float_nodes == (), pattern.__name__


@pytest.mark.parametrize(
    ("name", "floating"),
    [
        ("HardSqueezeExcite", {"HardSigmoid": 1}),
        ("HardSwish", {"HardSigmoid": 1, "Mul": 1}),
        ("Attention", {"LayerNormalization": 1, "MatMul": 2, "Mul": 1, "Softmax": 1}),
    ],
)
def test_float_islands_leave_their_neighbours_integer(exported, networks, name, floating):
    kernels = count_kernels(exported(getattr(networks, name))[1])
    assert kernels.floating == floating
    integer, total = kernels.of("Conv", "Gemm", "Add")
    assert integer == total > 0


class FixedBatch(torch.nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class NoOnnxForm(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x[:, 0]).real


@pytest.mark.parametrize("module", [FixedBatch(), NoOnnxForm()])
def test_what_cannot_be_exported_is_an_error(module, networks, manifest, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(GraphError) as caught:
        export_onnx(module, input_size=networks.SIZE, path=path, manifest=manifest)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (torch.special.bessel_j0, "the operator prims.bessel_j0 has no ONNX form"),
        (lambda x: torch.cdist(x, x), "the operator aten._cdist_forward has no ONNX form"),
        (lambda x: torch.histc(x).expand(x.shape[0], -1), "the operator aten.histc: "),
    ],
)
def test_an_operator_without_an_onnx_form_is_named(function, said, networks, manifest, tmp_path):
    class Calls(torch.nn.Module):
        def forward(self, x):
            return function(x).flatten(1)

    with pytest.raises(GraphError) as caught:
        export_onnx(Calls(), input_size=networks.SIZE, path=tmp_path / "m.onnx", manifest=manifest)
    assert said in caught.value.message
    assert "\x1b" not in caught.value.message
    assert "other operators" in caught.value.hint


def test_an_unknown_pack_is_a_clear_error(networks, manifest, tmp_path):
    path = str(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="'4bit' is unknown"):
        export_onnx(networks.Middle(), input_size=networks.SIZE, path=path, manifest=manifest, pack="4bit")


def test_missing_folder_is_an_input_error(networks, manifest, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        export_onnx(
            networks.Middle(),
            input_size=networks.SIZE,
            path=tmp_path / "missing" / "m.onnx",
            manifest=manifest,
        )
