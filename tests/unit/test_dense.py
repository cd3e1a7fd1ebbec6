"""Dense blocks: one tensor read by many concatenations, all of which run on codes."""

import pytest
import torch
from networks import DenseLayer, conv_bn, deployed, images, trained
from torch import Tensor, nn

from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.ort import count_kernels
from metaaug_cli.graph.placement import Bits
from metaaug_cli.verification.parity import check_parity


class TwoBlocks(nn.Module):
    """DenseNet in small: stem with a max pool, dense block, transition, dense block, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.first = nn.ModuleList(DenseLayer(6 + 4 * i, 4) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 8, 1, bias=False), nn.AvgPool2d(2)
        )
        self.second = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(2))
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(_dense(self.first, self.stem(x)))
        return self.head(torch.relu(self.norm(_dense(self.second, x))).mean((2, 3)))


def _dense(layers: nn.ModuleList, x: Tensor) -> Tensor:
    features = [x]
    for layer in layers:
        features.append(layer(*features))
    return torch.cat(features, 1)


@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(2, 4)], ids=["W8A8", "W2A4"])
def test_no_node_of_a_dense_network_is_left_in_float(bits, manifest, tmp_path):
    calibration = images(16, (3, 16, 16))
    graph = deployed(trained(TwoBlocks()), calibration, bits)
    path = tmp_path / "dense.onnx"
    export_onnx(graph, input_size=(3, 16, 16), path=path, manifest=manifest)
    kernels = count_kernels(path)
    assert kernels.float_nodes == ()
    assert kernels.integer["Concat"] == 5  # the first layer of a block reads one tensor: nothing to join
    assert kernels.integer["MaxPool"] == 1
    parity = check_parity(path, graph, [calibration], reference=True)
    assert parity.passed, parity.verdict()
    assert sum(layer.forced.mismatches for layer in parity.layers) == 0
