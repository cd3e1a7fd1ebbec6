"""What a run measures of itself."""

import numpy as np
import pytest
import torch

from metaaug_cli.runs.measured import top1


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_the_class_of_logits(kind):
    assert top1(kind([[0.1, 2.0, 1.0], [3.0, 0.0, 1.0]])).tolist() == [1, 0]
    assert top1(kind([[-0.5], [0.5], [0.0]])).tolist() == [False, True, False]
