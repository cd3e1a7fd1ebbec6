"""What normal form rewrites, from capture to parity: the file computes what is simulated."""

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

SIZE = (3, 12, 13)


class Images(nn.Module):
    """Convolution, ``change``, convolution, logits; no ReLU, so that the grid has a zero inside."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)
        self.change = change

    def forward(self, x):
        x = F.relu(self.second(self.change(self.first(x))))
        return self.head(x.mean((2, 3)))


class Rows(nn.Module):
    """Convolution, ``change`` of its rows joined, 1-D convolution, logits."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv1d(6, 6, 1), nn.Linear(6, 5)
        self.change = change

    def forward(self, x):
        x = F.relu(self.second(self.change(self.first(x).flatten(2))))
        return self.head(x.mean(2))


class Head(nn.Module):
    """The head that transfer learning puts on a network."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout())
        self.head = nn.Sequential(pool, nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, x):
        return self.head(F.relu(self.first(x)))


class BothPools(nn.Module):
    def forward(self, x):
        return torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 2)


class Taken(nn.Module):
    """Its layers are called what torch's graph modules call their own attributes."""

    def __init__(self):
        super().__init__()
        self.code, self.graph, self.meta = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.meta(F.relu(self.graph(F.relu(self.code(x)))).mean((2, 3)))


NETWORKS = {
    "divisor": lambda: Images(nn.AvgPool2d(2, divisor_override=1)),
    "divisor, ceil": lambda: Images(nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5)),
    "ceil": lambda: Images(nn.AvgPool2d(2, ceil_mode=True)),
    "ceil, padding counts": lambda: Images(nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "rows, ceil": lambda: Rows(nn.AvgPool1d(5, 3, 1, ceil_mode=True)),
    "rows, same padding": lambda: Rows(nn.Conv1d(6, 6, 4, padding="same")),
    "rows, norm": lambda: Rows(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6))),
    "head with norms": Head,
    "greatest value": lambda: Images(BothPools()),
    "taken names": Taken,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_is_simulated(name, tmp_path):
    network = trained(NETWORKS[name]())
    batch = images(24, SIZE)
    graph = deploy(searched(capture(network, SIZE), Bits(8, 8), "integer", batch))
    path = tmp_path / "net.onnx"
    manifest = Manifest(model="net", placement="integer", method="nearest")
    export_onnx(graph, input_size=SIZE, path=path, manifest=manifest)
    parity = check_parity(path, graph, [images(20, SIZE, seed=2)], reference=True)
    assert parity.passed, parity.verdict()
    with torch.no_grad():
        wanted = network(batch)
    assert (graph(batch) - wanted).abs().max() < 0.25 * wanted.std()
