"""What normal form rewrites, from capture to parity: the file computes what is simulated."""

import pytest
import torch
from file_parity import Between, assert_file_computes_what_is_simulated
from torch import nn
from torch.nn import functional as F

SIZE = (3, 12, 13)


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


def shifted(x):
    result = torch.zeros_like(x)
    result[:, :2, :-1] = x[:, :2, 1:]
    result[:, 2:] = x[:, 2:]
    return result


def scaled(x):
    x[:, :2] *= 0.5
    return x


class Kernels(nn.Module):
    """Layers whose weights are not called ``weight``, with norms to fold into them."""

    def __init__(self):
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.ones(6, 3, 3, 3)), nn.Parameter(torch.ones(5, 6))
        self.norm, self.rows = nn.BatchNorm2d(6), nn.BatchNorm1d(5)

    def forward(self, x):
        x = F.relu(self.norm(F.conv2d(x, self.kernel)))
        return self.rows(F.linear(x.mean((2, 3)), self.matrix))


NETWORKS = {
    "divisor": lambda: Between(nn.AvgPool2d(2, divisor_override=1)),
    "divisor, ceil": lambda: Between(nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5)),
    "ceil": lambda: Between(nn.AvgPool2d(2, ceil_mode=True)),
    "ceil, padding counts": lambda: Between(nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "rows, ceil": lambda: Rows(nn.AvgPool1d(5, 3, 1, ceil_mode=True)),
    "rows, same padding": lambda: Rows(nn.Conv1d(6, 6, 4, padding="same")),
    "rows, norm": lambda: Rows(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6))),
    "head with norms": Head,
    "greatest value": lambda: Between(BothPools()),
    "taken names": Taken,
    "uneven greatest values": lambda: Between(nn.AdaptiveMaxPool2d((3, 4))),
    "weighted sum": lambda: Between(lambda x: torch.add(F.relu(x), x, alpha=0.3)),
    "written slices": lambda: Between(shifted),
    "scaled slice": lambda: Between(scaled),
    "attention by greatest values": lambda: Between(lambda x: x * torch.sigmoid(x.max(1, keepdim=True)[0])),
    "weights of another name": Kernels,
    "random slope": lambda: Between(nn.RReLU()),
    "generalised mean": lambda: Between(lambda x: F.avg_pool2d(F.relu(x).pow(3), 2).pow(1 / 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_is_simulated(name, tmp_path):
    assert_file_computes_what_is_simulated(NETWORKS[name](), SIZE, tmp_path)
