"""From a network to its file and back: what several tests ask of every exported form."""

from pathlib import Path

import torch
from networks import images, searched, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.deployment.deploy import deploy
from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits
from metaaug_cli.verification.parity import check_parity


class Between(nn.Module):
    """Convolution, ``change``, convolution, logits; without a ReLU before it, grids have a zero inside."""

    def __init__(self, change, kernel=1):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, kernel), nn.Linear(6, 5)
        self.change = change

    def forward(self, x):
        x = F.relu(self.second(self.change(self.first(x))))
        return self.head(x.mean((2, 3)))


def assert_file_computes_what_is_simulated(
    network: nn.Module, size: tuple[int, int, int], folder: Path
) -> None:
    """8 bits, ``integer`` placement: parity with ONNX Runtime and the reference, and near to the network."""
    network = trained(network)
    batch = images(24, size)
    graph = deploy(searched(capture(network, size), Bits(8, 8), "integer", batch))
    path = folder / "net.onnx"
    manifest = Manifest(model="net", placement="integer", method="nearest")
    export_onnx(graph, input_size=size, path=path, manifest=manifest)
    parity = check_parity(path, graph, [images(20, size, seed=2)], reference=True)
    assert parity.passed, parity.verdict()
    with torch.no_grad():
        wanted = network(batch)
    assert (graph(batch) - wanted).abs().max() < 0.25 * wanted.std()
