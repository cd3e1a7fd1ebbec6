"""Losses of block reconstruction against their formulas written as loops."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaaug_cli.quantization.losses import annealed_beta, reconstruction_loss, rounding_regularizer


def test_reconstruction_sums_channels_and_averages_batch_and_positions():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5, 2, generator=generator)
    total = 0.0
    for n in range(3):
        for h in range(5):
            for w in range(2):
                total += sum(float(a[n, c, h, w] - b[n, c, h, w]) ** 2 for c in range(4))
    assert float(reconstruction_loss([a], [b], [1])) == pytest.approx(total / (3 * 5 * 2), rel=1e-5)


def test_channels_may_come_last():
    tokens, target = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    found = reconstruction_loss([tokens], [target], [2])
    torch.testing.assert_close(found, reconstruction_loss([tokens.mT], [target.mT], [1]))
    assert float(found) == pytest.approx(float((tokens - target).square().sum()) / (3 * 7), rel=1e-5)


def test_reconstruction_of_several_outputs_is_their_sum():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 4, generator=generator)
    c, d = torch.randn(2, 6, 4, 3, 3, generator=generator)
    together = reconstruction_loss([a, c], [b, d], [1, 1])
    one, other = reconstruction_loss([a], [b], [1]), reconstruction_loss([c], [d], [1])
    torch.testing.assert_close(together, one + other)
    assert float(reconstruction_loss([a], [b], [1])) == pytest.approx(
        float((a - b).norm() ** 2) / 6, rel=1e-5
    )


def test_reconstruction_refuses_outputs_without_a_target():
    with pytest.raises(ValueError, match="zip"):
        reconstruction_loss([torch.ones(2, 2)], [torch.ones(2, 2), torch.ones(2, 2)], [1])


def test_reconstruction_gradient():
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: reconstruction_loss([x], [target], [1]), x)


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    beta=st.floats(2, 20),
)
def test_regularizer_is_the_formula_of_adaround(values, beta):
    expected = sum(1 - abs(2 * h - 1) ** beta for h in values)
    h = torch.tensor(values, dtype=torch.float64)
    assert float(rounding_regularizer([h], beta)) == pytest.approx(expected, abs=1e-9)


def test_regularizer_is_least_at_0_and_1_and_pushes_towards_them():
    assert float(rounding_regularizer([torch.tensor([0.0, 1.0])], 2.0)) == 0.0
    assert float(rounding_regularizer([torch.tensor([0.5]), torch.tensor([0.5, 0.5])], 7.0)) == 3.0
    h = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    rounding_regularizer([h], 3.0).backward()
    assert h.grad[0] > 0  # descending goes to 0
    assert h.grad[1] < 0  # and to 1
    assert torch.autograd.gradcheck(lambda h: rounding_regularizer([h], 3.0), h)


def test_annealing_is_off_then_linear():
    betas = [annealed_beta(i, 100, warmup=0.2, start=20.0, end=2.0) for i in range(100)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20.0
    assert betas[60] == pytest.approx(11.0)
    steps = {round(b - a, 9) for a, b in pairwise(betas[20:])}
    assert steps == {round(-18 / 80, 9)}
    assert annealed_beta(100, 100, warmup=0.2, start=20.0, end=2.0) == pytest.approx(2.0)


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.99), data=st.data())
def test_annealing_stays_between_its_ends(steps, warmup, data):
    step = data.draw(st.integers(0, steps - 1))
    beta = annealed_beta(step, steps, warmup=warmup, start=20.0, end=2.0)
    assert (beta is None) == (step < warmup * steps)
    assert beta is None or (2.0 - 1e-9 <= beta <= 20.0 and math.isfinite(beta))
