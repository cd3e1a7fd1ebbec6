"""Sequential rounding against Optimal Brain Surgeon's update written out, and least squares against lstsq."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaaug_cli.quantization import second_order
from metaaug_cli.quantization.second_order import compensated_codes, corrected_weight

DAMPING = 0.01


def problem(groups=2, rows=3, k=7, samples=40, bits=3, seed=0):
    """Weights, correlated inputs and their second moments, and a grid that spans most of the weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, k, generator=generator)
    mixing = torch.randn(groups, k, k, generator=generator)
    inputs = torch.randn(groups, samples, k, generator=generator) @ mixing
    scale = weight.abs().amax(2) * 1.6 / (2**bits - 1)
    zero_point = torch.full_like(scale, 2.0 ** (bits - 1))
    return weight, inputs, inputs.mT @ inputs, scale, zero_point


def nearest(weight, scale, zero_point, bits):
    rounded = torch.round(weight / scale[..., None])
    return torch.minimum(torch.maximum(rounded, -zero_point[..., None]), 2**bits - 1 - zero_point[..., None])


def output_error(weight, codes, scale, hessian):
    missed = weight.double() - codes.double() * scale.double()[..., None]
    return torch.einsum("grk,gkl,grl->gr", missed, hessian.double(), missed)


def surgeon(weight, hessian, scale, zero_point, bits):
    """One row: quantize the column with the largest H_jj, move the rest by OBS, drop it from H, repeat."""
    h = hessian.double().numpy() / hessian.double().diagonal().mean().item()
    h = h + DAMPING * np.eye(len(h))
    w, codes, left = weight.double().numpy().copy(), np.zeros(len(h)), list(range(len(h)))
    for j in np.argsort(-np.diag(h), kind="stable"):
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        at = left.index(j)
        codes[j] = np.clip(np.round(w[j] / scale), -zero_point, 2**bits - 1 - zero_point)
        w[left] -= (w[j] - codes[j] * scale) / inverse[at, at] * inverse[at]
        left.remove(j)
    return codes


@pytest.mark.parametrize(("k", "bits"), [(1, 4), (7, 2), (9, 3), (70, 4), (150, 2)])
def test_codes_are_those_of_optimal_brain_surgeon(k, bits):
    weight, _, hessian, scale, zero_point = problem(k=k, bits=bits, samples=3 * k + 5)
    codes, found = compensated_codes(weight, hessian, scale, zero_point, bits, factors=(1.0,))
    torch.testing.assert_close(found, scale.double())
    for g in range(2):
        for r in range(3):
            expected = surgeon(weight[g, r], hessian[g], float(scale[g, r]), float(zero_point[g, r]), bits)
            np.testing.assert_array_equal(codes[g, r].numpy(), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8), k=st.sampled_from([1, 9, 20]))
def test_codes_stay_on_the_grid_and_lower_the_output_error(seed, bits, k):
    weight, _, hessian, scale, zero_point = problem(groups=1, rows=8, k=k, bits=bits, seed=seed)
    codes, scales = compensated_codes(weight, hessian, scale, zero_point, bits)
    unsigned = codes + zero_point.double()[..., None]
    assert torch.equal(unsigned, unsigned.round())
    assert unsigned.min() >= 0
    assert unsigned.max() <= 2**bits - 1
    before = output_error(weight, nearest(weight, scale, zero_point, bits), scale, hessian).sum()
    assert output_error(weight, codes, scales, hessian).sum() <= before * 1.02


def test_each_row_takes_the_factor_that_serves_it_best():
    weight, _, hessian, scale, zero_point = problem(rows=12)
    damped = hessian + DAMPING * torch.diag_embed(
        hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(2, 7)
    )
    factors = (1.0, 0.7, 1.3)
    single = [compensated_codes(weight, hessian, scale, zero_point, 3, factors=(f,)) for f in factors]
    errors = torch.stack([output_error(weight, codes, scales, damped) for codes, scales in single])
    best = errors.argmin(0)
    assert len(best.unique()) > 1
    codes, scales = compensated_codes(weight, hessian, scale, zero_point, 3, factors=factors)
    torch.testing.assert_close(scales, (scale * torch.tensor(factors)[best]).double())
    torch.testing.assert_close(output_error(weight, codes, scales, damped), errors.amin(0))


def test_chunks_of_rows_change_nothing(monkeypatch):
    arguments = problem(rows=10)
    weight, _, hessian, scale, zero_point = arguments
    whole = compensated_codes(weight, hessian, scale, zero_point, 3)
    monkeypatch.setattr(second_order, "_LARGEST_CHUNK", 1)
    parts = compensated_codes(weight, hessian, scale, zero_point, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_inputs_that_are_always_zero_leave_nearest_rounding():
    weight, inputs, _, scale, zero_point = problem()
    inputs[0] = 0  # a whole group that sees nothing
    inputs[1, :, 2] = 0  # one input of the other
    hessian = inputs.mT @ inputs
    codes, _ = compensated_codes(weight, hessian, scale, zero_point, 3, factors=(1.0,))
    expected = nearest(weight, scale, zero_point, 3).double()
    torch.testing.assert_close(codes[0], expected[0])
    torch.testing.assert_close(codes[1, :, 2], expected[1, :, 2])
    corrected = corrected_weight(weight, hessian, hessian)
    torch.testing.assert_close(corrected, weight.double())


def test_moments_of_fewer_samples_than_inputs_are_enough():
    weight, _, hessian, scale, zero_point = problem(k=30, samples=4)
    codes, _ = compensated_codes(weight, hessian, scale, zero_point, 4)
    assert bool(codes.isfinite().all())


def test_an_indefinite_matrix_is_damped_until_it_is_not():
    weight, _, hessian, scale, zero_point = problem(groups=1)
    hessian = hessian - 2 * torch.eye(7) * hessian.diagonal(dim1=1, dim2=2).mean()
    hessian = hessian.diagonal(dim1=1, dim2=2).abs().diag_embed() + hessian.triu(1) + hessian.triu(1).mT
    codes, _ = compensated_codes(weight, hessian, scale, zero_point, 4)
    assert bool(codes.isfinite().all())


def test_the_corrected_weight_is_a_least_squares_solution():
    weight, exact, _, _, _ = problem(groups=1)
    generator = torch.Generator().manual_seed(9)
    quantized = exact + 0.5 * torch.randn(exact.shape, generator=generator)
    hessian, cross = quantized.mT @ quantized, exact.mT @ quantized
    pull = second_order._PULL * hessian.double().diagonal(dim1=1, dim2=2).mean()
    system = torch.cat([quantized[0].double(), pull.sqrt() * torch.eye(7, dtype=torch.float64)])
    wanted = torch.cat([(exact[0] @ weight[0].T).double(), pull.sqrt() * weight[0].T.double()])
    expected = torch.linalg.lstsq(system, wanted).solution.T
    torch.testing.assert_close(corrected_weight(weight, hessian, cross)[0], expected, rtol=1e-4, atol=1e-5)
