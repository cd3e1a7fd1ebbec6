"""Operators that few networks use, from capture to parity: the file computes what is simulated."""

import pytest
import torch
from file_parity import Between, assert_file_computes_what_is_simulated
from torch.nn import functional as F

SIZE = (3, 16, 16)


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
    network = Between(lambda x: CHANGES[name](F.relu(x)), kernel=3)
    assert_file_computes_what_is_simulated(network, SIZE, tmp_path)
