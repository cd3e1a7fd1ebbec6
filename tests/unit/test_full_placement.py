"""Every layer and tensor at the chosen bits, with powers of two as scales, from learning to the ONNX file."""

import numpy as np
import onnx
import pytest
import torch
from networks import FAMILIES, SIZE, images, trained
from onnx import numpy_helper

from metaaug_cli.calibration.data import make_calibration_set
from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.pipeline import quantize
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.verification.codes import RuntimeCodes
from metaaug_cli.verification.reference import IntegerExecutor

PREPROCESSING = Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.25,) * 3)


def run(name, *settings):
    model = LoadedModel(trained(FAMILIES[name]()), name, PREPROCESSING, "random", "0" * 64)
    calibration = make_calibration_set(images(8), PREPROCESSING, [str(i) for i in range(8)])
    given = ["quantization.placement=full", "reconstruction.iterations=4", "reconstruction.lr_scale=200"]
    return quantize(model, calibration, recipe=Recipe().override([*given, *settings]), device="cpu")


def exported(result, folder):
    path = folder / "model.onnx"
    manifest = Manifest(model="test", placement="full", method="genie")
    export_onnx(result.deployed, input_size=SIZE, path=path, manifest=manifest)
    return path


def scales(path):
    model = onnx.load(path)
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return np.concatenate([values[n.input[1]].ravel() for n in nodes])


@pytest.mark.parametrize(("name", "bits"), [("residual", (4, 4)), ("residual", (2, 4)), ("dense", (4, 4))])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_exported_file_computes_the_simulated_codes(tmp_path, name, bits, power_of_two):
    settings = [f"quantization.weight_bits={bits[0]}", f"quantization.act_bits={bits[1]}"]
    result = run(name, *settings, f"quantization.scale_power_of_two={power_of_two}")
    chain = result.chain
    assert {q.bits for q in chain.weights.values()} == {bits[0]}
    assert {q.bits for q in chain.activations.values()} == {bits[1]}
    path = exported(result, tmp_path)
    x = images(32, seed=5)
    runtime = RuntimeCodes(path)
    logits, codes = runtime.run(x.numpy())
    _, exact = IntegerExecutor(runtime.model).run(x.numpy())
    assert {n: int((exact[n] != codes[n]).sum()) for n in codes} == dict.fromkeys(codes, 0)
    with torch.no_grad():
        np.testing.assert_allclose(
            IntegerSimulation(result.deployed)(x).numpy(), logits, rtol=1e-5, atol=1e-6
        )
    assert bool((np.frexp(scales(path))[0] == 0.5).all()) is power_of_two


def test_learning_moves_activation_scales_by_whole_octaves_only():
    result = run("residual", "quantization.scale_power_of_two=true")
    moved = [float(q.relative_scale.detach()) for q in result.chain.activations.values()]
    assert any(value != 1.0 for value in moved)
    for quantizer in [*result.chain.activations.values(), *result.chain.weights.values()]:
        assert bool((torch.frexp(quantizer.scale.detach()).mantissa == 0.5).all())
    assert all(bool((q.relative_scale == 1).all()) for q in result.chain.weights.values())
