"""The fused quantizer and loss against their plain formulas, whatever the layout and wherever pieces end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaaug_cli.layout import fast_layout
from metaaug_cli.quantization import fused, losses
from metaaug_cli.quantization.drops import drop_mask
from metaaug_cli.quantization.functional import fake_quantize

SHAPES = [(2, 3, 4, 5), (5, 8), (33,), (2, 3, 1, 1)]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Pieces of seven elements, so that small tensors have many."""
    monkeypatch.setattr(fused, "_PIECE", 7)


def plain(x, scale, zero_point, bits, prob, seed):
    """QDrop's formula, term by term."""
    mask = drop_mask(x, prob, torch.Generator().manual_seed(seed))
    return mask * fake_quantize(x, scale, zero_point, bits) + (1 - mask) * x


@given(
    bits=st.integers(2, 8),
    zero=st.integers(0, 255),
    scale=st.floats(1e-3, 10.0),
    prob=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    shape=st.sampled_from(SHAPES),
    turn=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_plain_formula(bits, zero, scale, prob, shape, turn, seed):
    zero_point = torch.tensor(float(min(zero, 2**bits - 1)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = 4 * scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    x = fast_layout(x) if turn else x
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = []
    for formula in (
        lambda x, s: fused.drop_fake_quantize(
            x, s, zero_point, bits, prob=prob, generator=torch.Generator().manual_seed(seed)
        ),
        lambda x, s: plain(x, s, zero_point, bits, prob, seed),
    ):
        leaf, s = x.detach().requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        value = formula(leaf, s)
        found.append((value, *torch.autograd.grad(value, (leaf, s), upstream)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert found[0][0].stride() == x.stride()


def test_float32_values_are_the_same_bits():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    arguments = (torch.tensor(0.3), torch.tensor(2.0), 2)
    assert torch.equal(fused.drop_fake_quantize(x, *arguments), fake_quantize(x, *arguments))


@pytest.mark.parametrize("wanted", ["x", "scale", "neither"])
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    x, scale = torch.randn(20), torch.tensor(0.5)
    if wanted != "neither":
        (x if wanted == "x" else scale).requires_grad_()
    result = fused.drop_fake_quantize(x, scale, torch.tensor(2.0), 2)
    assert result.requires_grad == (wanted != "neither")
    if wanted != "neither":
        result.sum().backward()
        assert (x.grad is not None) == (wanted == "x")
        assert (scale.grad is not None) == (wanted == "scale")


def test_nothing_is_worked_out_for_a_gradient_where_none_is_recorded(monkeypatch):
    asked = []
    monkeypatch.setattr(fused, "_write_slopes", lambda *_: asked.append(True))
    scale = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        fused.drop_fake_quantize(torch.randn(20), scale, torch.tensor(2.0), 2)
    assert asked == []
    fused.drop_fake_quantize(torch.randn(20), scale, torch.tensor(2.0), 2)
    assert asked


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 9), (4, 9, 5)])
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_squared_error_is_the_reconstruction_loss(shape, turn, last):
    generator = torch.Generator().manual_seed(1)
    outputs, targets = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    outputs = (fast_layout(outputs) if turn else outputs).requires_grad_()
    axis = len(shape) - 1 if last else 1
    ours = fused.squared_error(outputs, targets, axis)
    reference = losses.reconstruction_loss([outputs], [targets], [axis])
    torch.testing.assert_close(ours, reference)
    # hand formula: mean over images and positions of the sum over channels
    terms = ((outputs - targets) ** 2).sum().item() / (outputs.numel() / shape[axis])
    assert ours.item() == pytest.approx(terms)
    gradients = [torch.autograd.grad(3 * loss, outputs)[0] for loss in (ours, reference)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].stride() == outputs.stride()
