"""The arithmetic of quantization: properties, hand numbers and formulas written a second time in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from metaaug_cli.quantization import functional as F

BITS = st.integers(2, 8)
SCALES = st.floats(1e-3, 10.0)
VALUES = arrays.arrays(
    np.float64, st.integers(1, 40), elements=st.floats(-50, 50, allow_subnormal=False)
).map(torch.from_numpy)


def on_grid(draw_bits, zero_point):
    return min(zero_point, 2**draw_bits - 1)


def test_hand_numbers_at_two_bits():
    x = torch.tensor([-1.3, -0.26, 0.0, 0.25, 0.75, 1.0, 9.0])
    codes = F.quantize(x, torch.tensor(0.5), 1, 2)
    # x / 0.5 is -2.6, -0.52, 0, 0.5, 1.5, 2, 18; halves go to the even neighbour; plus 1, clamped to 0 … 3
    assert codes.tolist() == [0, 0, 1, 1, 3, 3, 3]
    assert F.dequantize(codes, torch.tensor(0.5), 1).tolist() == [-0.5, -0.5, 0.0, 0.0, 1.0, 1.0, 1.0]


@given(x=VALUES, scale=SCALES, bits=BITS, zero=st.integers(0, 255))
def test_values_lie_on_the_grid_and_stay_there(x, scale, bits, zero):
    zero, s = on_grid(bits, zero), torch.tensor(scale, dtype=torch.float64)
    once = F.fake_quantize(x, s, zero, bits)
    codes = once / s + zero
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert codes.min() >= -1e-9
    assert codes.max() <= 2**bits - 1 + 1e-9
    torch.testing.assert_close(F.fake_quantize(once, s, zero, bits), once, rtol=0, atol=1e-12)


@given(x=VALUES, scale=SCALES, bits=BITS, zero=st.integers(0, 255))
def test_error_is_at_most_half_a_step_inside_and_the_end_outside(x, scale, bits, zero):
    zero, s = on_grid(bits, zero), torch.tensor(scale, dtype=torch.float64)
    low, high = -zero * scale, (2**bits - 1 - zero) * scale
    result = F.fake_quantize(x, s, zero, bits)
    inside = (x >= low) & (x <= high)
    assert ((result - x).abs()[inside] <= scale / 2 + 1e-9).all()
    expected = torch.where(x < low, low, high).double()
    torch.testing.assert_close(result[~inside], expected[~inside])


@given(x=VALUES, scale=SCALES, bits=BITS, zero=st.integers(0, 255))
def test_fake_quantize_is_quantize_then_dequantize(x, scale, bits, zero):
    zero, s = on_grid(bits, zero), torch.tensor(scale, dtype=torch.float64)
    expected = F.dequantize(F.quantize(x, s, zero, bits), s, zero)
    torch.testing.assert_close(F.fake_quantize(x, s, zero, bits), expected, rtol=0, atol=1e-12)


@given(x=VALUES, scale=SCALES, bits=BITS, zero=st.integers(0, 255))
def test_gradient_is_one_inside_the_range_and_zero_outside(x, scale, bits, zero):
    zero, s = on_grid(bits, zero), torch.tensor(scale, dtype=torch.float64)
    steps = (x / s).round()
    inside = (steps >= -zero) & (steps <= 2**bits - 1 - zero)
    x.requires_grad_()
    F.fake_quantize(x, s, zero, bits).sum().backward()
    torch.testing.assert_close(x.grad, inside.double())


@given(x=VALUES, scale=SCALES, bits=BITS, zero=st.integers(0, 255))
def test_scale_gradient_is_that_of_lsq(x, scale, bits, zero):
    zero, s = on_grid(bits, zero), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    F.fake_quantize(x, s, zero, bits).sum().backward()
    expected = 0.0
    for v in (x / scale).tolist():  # LSQ (Esser et al. 2020), equation 3
        low, high = -zero, 2**bits - 1 - zero
        rounded = np.round(v)
        expected += low if rounded < low else high if rounded > high else rounded - v
    assert float(s.grad) == pytest.approx(expected, abs=1e-6)


def test_gradients_agree_with_finite_differences_away_from_the_rounding_steps():
    """With the rounding frozen, s * clamp(x/s + r) is smooth: its exact derivatives are the claimed ones."""
    x = torch.tensor([-3.1, -0.41, 0.3, 0.77, 4.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    remainder = torch.tensor([-0.25, 0.025, 0.25, 0.075, 0.0], dtype=torch.float64)  # round(x / s) - x / s
    assert torch.allclose(x.detach() / 0.4 + remainder, torch.round(x.detach() / 0.4))

    def frozen(x, s):
        return torch.clamp(x / s + remainder, -2, 5) * s

    assert torch.autograd.gradcheck(frozen, (x, s))
    ours = torch.autograd.grad(F.fake_quantize(x, s, 2, 3).square().sum(), (x, s))
    reference = torch.autograd.grad(frozen(x, s).square().sum(), (x, s))
    torch.testing.assert_close(ours, reference)


def test_fake_quantize_is_differentiable_twice():
    x = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F.fake_quantize(x, s, 0, 3).square().sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(first, s)
    # x / s is 0.75 and 2.25. By the straight-through rule y = s * (x / s + r) with r fixed, so dy/ds = r.
    assert first.item() == pytest.approx(2 * (0.4 * 0.25 + 0.8 * -0.25))
    assert second.item() == pytest.approx(2 * (0.25**2 + 0.25**2))


@given(st.floats(0, 1, exclude_max=True))
def test_soft_rounding_inverts(fraction):
    f = torch.tensor(fraction, dtype=torch.float64)
    assert float(F.soft_rounding(F.inverse_soft_rounding(f))) == pytest.approx(fraction, abs=1e-12)
    if abs(fraction - 0.5) > 1e-12:  # exactly between two codes, the last bit decides
        assert (float(F.inverse_soft_rounding(f)) >= 0) == (fraction >= 0.5)


@given(st.floats(-20, 20))
def test_soft_rounding_is_the_stretched_sigmoid_of_adaround(v):
    expected = min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1))
    assert float(F.soft_rounding(torch.tensor(v, dtype=torch.float64))) == pytest.approx(expected, abs=1e-12)


def test_soft_rounding_gradient():
    v = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)  # inside the stretched range
    assert torch.autograd.gradcheck(F.soft_rounding, v)
    far = torch.tensor([-9.0, 9.0], requires_grad=True)
    F.soft_rounding(far).sum().backward()
    assert far.grad.tolist() == [0.0, 0.0]


@given(low=st.floats(-20, 20), width=st.floats(1e-3, 20), bits=BITS, symmetric=st.booleans())
def test_grid_spans_the_range_and_contains_zero(low, width, bits, symmetric):
    high = low + width
    ends = torch.tensor([low, high], dtype=torch.float64).unbind()
    scale, zero = (float(t) for t in F.grid(*ends, bits, symmetric=symmetric))
    assert zero == round(zero)
    assert 0 <= zero <= 2**bits - 1
    least, greatest = -zero * scale, (2**bits - 1 - zero) * scale
    slack = 1e-5 * max(1, abs(low), abs(high)) + (0.5 * scale if not symmetric else 0)
    assert least <= min(low, 0) + slack
    assert greatest >= max(high, 0) - slack
    if symmetric:
        assert zero == (2 ** (bits - 1) if low < 0 else 0)


def test_grid_of_nothing_has_a_positive_scale():
    scale, zero = F.grid(torch.zeros(2), torch.zeros(2), 4, symmetric=False)
    assert (scale > 0).all()
    assert zero.tolist() == [0, 0]


def brute_force(row, bits, symmetric, norm):
    """Every clip ratio in numpy: (least error, its scale, its zero point)."""
    best = (np.inf, None, None)
    levels = 2**bits - 1
    for hundredths in range(100, 0, -1):
        low, high = min(row.min(), 0) * hundredths / 100, max(row.max(), 0) * hundredths / 100
        if not symmetric:
            scale = (high - low) / levels
            zero = np.clip(np.round(-low / scale), 0, levels)
        elif low < 0:
            scale, zero = max(-low / 2 ** (bits - 1), high / (2 ** (bits - 1) - 1)), 2 ** (bits - 1)
        else:
            scale, zero = high / levels, 0
        quantized = (np.clip(np.round(row / scale) + zero, 0, levels) - zero) * scale
        error = np.mean(np.abs(row - quantized) ** norm)
        if error < best[0]:
            best = (error, scale, zero)
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_scale_search_finds_the_brute_force_optimum(bits, symmetric, norm):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(5, 200, generator=generator, dtype=torch.float64)
    rows *= torch.tensor([0.1, 1, 3, 1, 1])[:, None]
    rows[1] = rows[1].abs()
    rows[3] += 2.0
    rows[4, 0] = 40.0  # an outlier worth clipping
    scales, zeros = F.search_scale(rows, bits, symmetric=symmetric, norm=norm)
    for row, scale, zero in zip(rows.numpy(), scales.tolist(), zeros.tolist(), strict=True):
        error, expected_scale, expected_zero = brute_force(row, bits, symmetric, norm)
        assert scale == pytest.approx(expected_scale, rel=1e-9)
        assert zero == expected_zero
        quantized = (np.clip(np.round(row / scale) + zero, 0, 2**bits - 1) - zero) * scale
        assert np.mean(np.abs(row - quantized) ** norm) == pytest.approx(error, rel=1e-9)


def test_search_clips_the_outlier_at_low_bits():
    row = torch.cat([torch.linspace(-1, 1, 4000), torch.tensor([4.0])])[None]
    scale, zero = F.search_scale(row, 2, symmetric=False)
    assert float((3 - zero) * scale) < 2.0


def test_search_uses_the_full_range_of_a_sampled_tensor():
    sample = torch.linspace(0, 1, 50)[None]
    scale, _ = F.search_scale(sample, 8, symmetric=True, full_range=torch.tensor([[0.0, 100.0]]))
    ratios = float(scale) * 255 / 100.0  # the clip ratio is one of the hundredths of the full range
    assert ratios * 100 == pytest.approx(round(ratios * 100), abs=1e-3)
    assert 0.005 < ratios < 0.05


@given(
    bias=arrays.arrays(np.float64, 4, elements=st.floats(-5, 5)).map(torch.from_numpy),
    act=st.floats(1e-3, 1),
    weight=arrays.arrays(np.float64, 4, elements=st.floats(1e-3, 1)).map(torch.from_numpy),
)
def test_bias_lies_on_the_accumulator_grid(bias, act, weight):
    result = F.quantize_bias(bias, torch.tensor(act, dtype=torch.float64), weight).numpy()
    step = act * weight.numpy()
    codes = result / step
    assert np.abs(codes - np.round(codes)).max() < 1e-6
    assert (np.abs(result - bias.numpy()) <= step / 2 + 1e-9).all()


@given(x=VALUES)
def test_rounding_passes_the_gradient_through(x):
    assume(x.numel() > 0)
    x.requires_grad_()
    rounded = F.round_ste(x)
    torch.testing.assert_close(rounded.detach(), torch.from_numpy(np.round(x.detach().numpy())))
    rounded.sum().backward()
    assert (x.grad == 1).all()


def test_a_gradient_that_is_not_finite_becomes_zero_where_it_is_not():
    x = torch.tensor([0.0, 4.0, 0.0, 1.0], requires_grad=True)
    guarded = F.finite_gradient(x)
    assert torch.equal(guarded, x)
    (guarded.sqrt() * torch.tensor([1.0, 1.0, 0.0, -2.0])).sum().backward()  # inf, NaN between finite ones
    assert x.grad.tolist() == [0.0, 0.25, 0.0, -1.0]


def test_where_nothing_is_learned_the_gradients_guard_is_the_tensor_itself():
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert F.finite_gradient(x) is x
    assert F.finite_gradient(x.detach()).requires_grad is False


def test_nearest_power_of_two_is_exact_and_nearest():
    exponents = torch.arange(-40, 41)
    exact = torch.tensor([2.0 ** int(e) for e in exponents])
    for factor in (1.0, 1.4, 0.72):
        assert torch.equal(F.nearest_power_of_two(exact * factor), exact)
    assert torch.equal(F.nearest_power_of_two(exact * 1.42), exact * 2)
    assert torch.equal(F.nearest_power_of_two(exact * 0.7), exact / 2)


def test_power_of_two_passes_the_gradient():
    scale = torch.tensor([0.3, 5.0], requires_grad=True)
    F.nearest_power_of_two(scale).sum().backward()
    assert torch.equal(scale.grad, torch.ones(2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_power_of_two_search_beats_every_other_power(symmetric, bits):
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [7.0]])
    scale, zero = F.search_scale(x, bits, symmetric=symmetric, scale_power_of_two=True)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((3,), 0.5))

    def error(s, z):
        return (x - F.fake_quantize(x, s[:, None], z[:, None], bits)).abs().pow(2.4).mean(1)

    best = error(scale, zero)
    for power in range(-8, 5):
        for z in {float(2 ** (bits - 1))} if symmetric else map(float, range(2**bits)):
            other = error(torch.full((3,), 2.0**power), torch.full((3,), z))
            # An asymmetric search tries the zero points of its clip ratios only.
            assert bool((best <= other * (1 + 1e-6 if symmetric else 1.25)).all())
