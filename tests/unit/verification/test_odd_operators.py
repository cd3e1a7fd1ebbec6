"""Operators that few networks use, from capture to parity: the file computes what is simulated."""

import pytest
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

SIZE = (3, 16, 16)


class Net(nn.Module):
    """Convolution, ``change``, convolution, logits."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)
        self.change = change

    def forward(self, x):
        x = F.relu(self.second(self.change(F.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


def spatial_attention(x):
    return x * torch.softmax(x.flatten(2), -1).view_as(x) * 256


CHANGES = {
    "spatial attention": spatial_attention,
    "mask": lambda x: x * (x > 0.5),
    "added index": lambda x: x + x.argmax(1, keepdim=True),
    "crop by padding": lambda x: F.pad(x, (-1, -2, 0, -1)),
    "crop and padding": lambda x: F.pad(x, (-1, 2, 1, -1)),
    "enlarged by 1.7": lambda x: F.interpolate(x, scale_factor=1.7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_file_computes_what_is_simulated(name, tmp_path):
    module = capture(trained(Net(CHANGES[name])), SIZE)
    batch = images(24, SIZE)
    graph = deploy(searched(module, Bits(8, 8), "integer", batch))
    path = tmp_path / "net.onnx"
    manifest = Manifest(model="net", placement="integer", method="nearest")
    export_onnx(graph, input_size=SIZE, path=path, manifest=manifest)
    parity = check_parity(path, graph, [images(20, SIZE, seed=2)], reference=True)
    assert parity.passed, parity.verdict()
    wanted = module(batch)
    assert (graph(batch) - wanted).abs().max() < 0.25 * wanted.std()
