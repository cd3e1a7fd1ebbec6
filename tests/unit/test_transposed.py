"""Transposed convolutions: float weights between codes, which ONNX Runtime must not quantize on its own."""

import torch
from networks import deployed
from torch import nn

from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest, read_manifest
from metaaug_cli.graph.placement import Bits
from metaaug_cli.verification.parity import check_parity


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, 2, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def test_the_manifest_names_the_option_that_keeps_parity(tmp_path):
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = deployed(network(), images, Bits(4, 4))
    path = tmp_path / "transposed.onnx"
    manifest = Manifest(model="transposed", placement="integer", method="nearest")
    export_onnx(graph, input_size=(3, 16, 16), path=path, manifest=manifest)

    import onnx

    written = read_manifest(onnx.load(path))
    assert written is not None
    options = written.packing.session_options
    assert options == {"optimization.disable_specified_optimizers": "WeightBiasQuantization"}
    parity = check_parity(path, graph, [images], reference=True)
    assert parity.passed, parity.verdict()
    assert sum(layer.forced.mismatches for layer in parity.layers) == 0
