"""The learned quantizers against Genie-M's and LSQ's formulas, written a second time in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaaug_cli.quantization.functional import search_scale
from metaaug_cli.quantization.quantizers import ActivationQuantizer, WeightQuantizer

SHAPES = [(5, 3, 3, 3), (6, 1, 3, 3), (4, 7)]


def random_weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(shape, generator=generator) * channels


def genie(weight, initial_scale, scale, zero_point, logits, bits, *, soft):
    """W_q = s * (clamp(floor(W / s_init) + h(V) + z, 0, 2^b - 1) - z), channel by channel."""
    result = np.empty_like(weight)
    for c in range(len(weight)):
        h = np.clip(1.2 / (1 + np.exp(-logits[c])) - 0.1, 0, 1) if soft else (logits[c] >= 0).astype(float)
        codes = np.clip(np.floor(weight[c] / initial_scale[c]) + h + zero_point[c], 0, 2**bits - 1)
        result[c] = scale[c] * (codes - zero_point[c])
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (4, True), (8, True)])
@pytest.mark.parametrize("soft", [True, False])
def test_weights_follow_the_formula_after_learning_moved_everything(shape, bits, symmetric, soft):
    weight = random_weight(shape)
    quantizer = WeightQuantizer(weight, bits, symmetric=symmetric)
    initial = quantizer.scale.detach().clone()
    with torch.no_grad():
        quantizer.relative_scale.mul_(torch.linspace(0.8, 1.3, shape[0]))
        quantizer.rounding_logits.add_(torch.randn(shape))
    quantizer.soft = soft
    arguments = (initial, quantizer.scale, quantizer.zero_point, quantizer.rounding_logits)
    expected = genie(weight.numpy(), *(t.detach().numpy() for t in arguments), bits, soft=soft)
    np.testing.assert_allclose(quantizer().detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected, weight.numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_start_reproduces_the_weight_inside_the_range(shape):
    weight = random_weight(shape)
    quantizer = WeightQuantizer(weight, 4, symmetric=False)
    quantizer.soft = True
    per_channel = (-1, *[1] * (len(shape) - 1))
    scale, zero = quantizer.scale.view(per_channel), quantizer.zero_point.view(per_channel)
    expected = torch.minimum(torch.maximum(weight, -zero * scale), (15 - zero) * scale)
    torch.testing.assert_close(quantizer(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hard_start_is_nearest_rounding(bits):
    weight = random_weight((5, 40))
    quantizer = WeightQuantizer(weight, bits, symmetric=bits == 8)
    scale, zero = quantizer.scale.detach().numpy(), quantizer.zero_point.numpy()
    for row, s, z, got in zip(weight.numpy(), scale, zero, quantizer().detach().numpy(), strict=True):
        expected = s * (np.clip(np.floor(row / s + 0.5) + z, 0, 2**bits - 1) - z)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_every_channel_has_its_own_searched_scale():
    weight = random_weight((5, 3, 3, 3))
    quantizer = WeightQuantizer(weight, 4, symmetric=False)
    for channel in range(5):
        scale, zero = search_scale(weight[channel].reshape(1, -1), 4, symmetric=False)
        assert float(quantizer.scale[channel].detach()) == pytest.approx(float(scale))
        assert float(quantizer.zero_point[channel]) == float(zero)


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4, 8]))
def test_learning_may_start_from_any_codes(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight((4, 3, 3, 3), seed)
    quantizer = WeightQuantizer(weight, bits, symmetric=bits == 8)
    torch.testing.assert_close(quantizer.weight(), weight, rtol=1e-4, atol=1e-6)
    zero_point = quantizer.zero_point.view(-1, 1, 1, 1)
    codes = torch.randint(0, 2**bits, weight.shape, generator=generator) - zero_point
    scale = quantizer.scale.detach() * (0.5 + torch.rand(4, generator=generator))
    wanted = scale.view(-1, 1, 1, 1) * (codes + 1.5 * torch.randn(weight.shape, generator=generator))
    quantizer.start_at(codes, scale, wanted)
    torch.testing.assert_close(quantizer.codes() - zero_point, codes)
    torch.testing.assert_close(quantizer.scale.detach(), scale)
    # Soft, it stands halfway between the code and what was wanted, as far as that is next to it.
    quantizer.soft = True
    exact = (wanted / scale.view(-1, 1, 1, 1)).clamp(min=-zero_point, max=2**bits - 1 - zero_point)
    halfway = codes + 0.5 * (exact - codes).clamp(-1, 1)
    torch.testing.assert_close(quantizer.codes() - zero_point, halfway, rtol=0, atol=2e-3)


def test_a_start_cannot_push_a_bias_past_int32():
    quantizer = WeightQuantizer(random_weight((3, 20)), 4, symmetric=False)
    scale = torch.tensor([1.0, 1e-20, 1.0])
    quantizer.start_at(torch.zeros(3, 20), scale, torch.zeros(3, 20))
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor([1.0, 2.0**-14, 1.0]))


def test_symmetric_zero_point_is_the_middle_even_for_positive_channels():
    weight = random_weight((3, 20)).abs()
    quantizer = WeightQuantizer(weight, 8, symmetric=True)
    assert quantizer.zero_point.tolist() == [128.0] * 3
    assert float((quantizer() - weight).abs().max().detach()) <= float(quantizer.scale.max().detach())
    codes = quantizer.state()["codes"].int() - 128
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 127


def test_dead_channels_keep_a_scale_whose_bias_fits_int32():
    weight = random_weight((4, 9))
    weight[2] = 0.0
    quantizer = WeightQuantizer(weight, 4, symmetric=False)
    scale = quantizer.scale.detach()
    assert float(scale[2]) == pytest.approx(float(scale.max()) * 2**-14)
    assert float(quantizer()[2].detach().abs().max()) == 0.0


@pytest.mark.parametrize("value", [0.0, 1e-10, -1e-10])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_dead_layer_keeps_scales_whose_bias_fits_int32(value, symmetric, bits):
    quantizer = WeightQuantizer(torch.full((4, 9), value), bits, symmetric=symmetric)
    assert float(quantizer.scale.detach().min()) >= 1e-4
    assert float(quantizer().detach().abs().max()) == 0.0


@pytest.mark.parametrize("soft", [True, False])
def test_gradients_reach_rounding_and_scale(soft):
    quantizer = WeightQuantizer(random_weight((3, 4)).double(), 4, symmetric=False).double()
    quantizer.soft = soft

    def value(scale, logits):
        return torch.func.functional_call(quantizer, {"relative_scale": scale, "rounding_logits": logits}, ())

    scale = torch.full((3,), 1.1, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    if soft:
        assert torch.autograd.gradcheck(value, (scale, logits))
        assert torch.autograd.grad(value(scale, logits).sum(), logits)[0].abs().max() > 0
    else:
        assert torch.autograd.gradcheck(lambda s: value(s, logits.detach()), scale)


def test_saved_state_gives_the_same_weight_and_is_integers():
    quantizer = WeightQuantizer(random_weight((5, 3, 3, 3)), 3, symmetric=False)
    with torch.no_grad():
        quantizer.relative_scale.mul_(1.07)
        quantizer.rounding_logits.add_(torch.randn(5, 3, 3, 3))
    quantizer.soft = True
    state = quantizer.state()
    assert quantizer.soft
    assert state["codes"].dtype == torch.uint8
    assert int(state["codes"].max()) <= 7
    quantizer.soft = False
    other = WeightQuantizer(random_weight((5, 3, 3, 3), seed=9), 3, symmetric=False)
    assert not torch.allclose(other(), quantizer())
    other.load(state)
    torch.testing.assert_close(other(), quantizer(), rtol=1e-6, atol=0)
    for key, value in other.state().items():
        assert torch.equal(value, state[key]), key


@given(seed=st.integers(0, 50), bits=st.integers(2, 8))
def test_positive_activations_get_an_unsigned_grid_and_others_a_signed_one(seed, bits):
    values = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    for sample, zero in ((values.abs(), 0.0), (values, float(2 ** (bits - 1)))):
        quantizer = ActivationQuantizer(bits, symmetric=True)
        quantizer.search(sample)
        assert float(quantizer.zero_point) == zero
        expected, _ = search_scale(sample[None], bits, symmetric=True)
        assert float(quantizer.scale.detach()) == pytest.approx(float(expected))


def test_search_starts_over_from_a_learned_scale():
    quantizer = ActivationQuantizer(4, symmetric=True)
    with torch.no_grad():
        quantizer.relative_scale.fill_(3.0)
    quantizer.search(torch.linspace(0, 1, 100))
    assert float(quantizer.relative_scale.detach()) == 1.0
    assert float(quantizer.scale.detach()) == pytest.approx(1 / 15, rel=0.1)


def test_sampled_search_sees_every_column_of_an_image():
    """A large tensor is sampled; where odd columns hold what matters, a sample of even ones would miss it."""
    columns = torch.tensor([0.1, 1.0]).repeat(16)  # a stripe along the width
    values = torch.rand(64, 16, 32, 32, generator=torch.Generator().manual_seed(0)) * columns
    quantizer = ActivationQuantizer(4, symmetric=True)
    quantizer.search(values)
    everything, _ = search_scale(values.flatten()[None], 4, symmetric=True)
    assert float(quantizer.scale.detach()) == pytest.approx(float(everything), rel=0.03)


def test_activations_on_the_grid_and_mixed_while_learning():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(3, symmetric=True)
    quantizer.search(x)
    on_grid = quantizer(x).detach()
    s = float(quantizer.scale.detach())
    expected = (np.clip(np.round(x.numpy() / s) + 4, 0, 7) - 4) * s
    np.testing.assert_allclose(on_grid.numpy(), expected, rtol=1e-5, atol=1e-6)

    quantizer.quant_prob, quantizer.generator = 0.5, torch.Generator().manual_seed(1)
    mixed = quantizer(x).detach()
    kept, quantized = torch.isclose(mixed, x), torch.isclose(mixed, on_grid)
    assert (kept | quantized).all()
    assert 0.35 < float((quantized & ~kept).float().mean()) < 0.65


def test_activation_state_round_trip():
    quantizer = ActivationQuantizer(4, symmetric=False)
    quantizer.search(torch.linspace(-1, 3, 500))
    with torch.no_grad():
        quantizer.relative_scale.fill_(1.3)
    other = ActivationQuantizer(4, symmetric=False)
    other.load(quantizer.state())
    x = torch.linspace(-2, 5, 50)
    assert torch.equal(other(x), quantizer(x))
    assert 0 < float(other.zero_point) < 15


def test_vanishing_activations_keep_a_grid_that_a_bias_can_follow():
    quantizer = ActivationQuantizer(8, symmetric=False)
    quantizer.search(torch.linspace(0, 1e-9, 100))
    scale = quantizer.scale.item()
    assert scale == pytest.approx(1e-6)
    bias_code = 0.05 / (scale * 1e-4)
    assert bias_code < 2**31
