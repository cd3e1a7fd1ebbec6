"""Transposed convolutions: float weights between codes, which ONNX Runtime must not quantize on its own."""

import torch
from torch import nn

from metaaug_cli.blocks import build_chain, search_activation_scales
from metaaug_cli.capture import capture
from metaaug_cli.deploy import deploy
from metaaug_cli.export import export_onnx
from metaaug_cli.manifest import Manifest, read_manifest
from metaaug_cli.parity import check_parity
from metaaug_cli.placement import Bits, place


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
    module = capture(network(), (3, 16, 16))
    chain = build_chain(module, place(module.graph, kind="integer", bits=Bits(4, 4)))
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    values = (images,)
    for block in chain.blocks:
        search_activation_scales(block, values)
        values = block.quantized_block(*values)
    deployed = deploy(chain)
    path = tmp_path / "transposed.onnx"
    manifest = Manifest(model="transposed", placement="integer", method="nearest")
    export_onnx(deployed, input_size=(3, 16, 16), path=path, manifest=manifest)

    import onnx

    written = read_manifest(onnx.load(path))
    assert written is not None
    options = written.packing.session_options
    assert options == {"optimization.disable_specified_optimizers": "WeightBiasQuantization"}
    parity = check_parity(path, deployed, [images], reference=True)
    assert parity.passed, parity.verdict()
    assert sum(layer.forced.mismatches for layer in parity.layers) == 0
