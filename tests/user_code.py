"""Python files and pickles as a user might bring them, for tests of what loads them."""

import os
from pathlib import Path

from metaaug_cli.networks.models import LoadedModel, load_model

FLAGS = {"size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
"""Preprocessing of ``NETWORK``, which does not say how its images are prepared."""

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

def build():
    return Net()

def trained():
    net = Net()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.5)
    return net

def broken():
    return torch.zeros(2, 3) @ torch.zeros(2, 3)

def needy(width):
    return Net(width)

def wrong():
    return {"net": Net()}
"""

_CLASSIFIER = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.head(self.pool(x).flatten(1))


def net():
    torch.manual_seed(0)
    return Net()
"""


def load(network_file: Path, weights: Path, **changes: object) -> LoadedModel:
    """``NETWORK``'s untrained factory with a weights file; ``changes`` are further options."""
    return load_model(f"{network_file}:build", weights=weights, **(FLAGS | changes))


def classifier(classes: int) -> str:
    """A Python file with a small classifier of images of any size: ``Net``, and its factory ``net``."""
    return _CLASSIFIER.replace("CLASSES", str(classes))


class Exploit:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
