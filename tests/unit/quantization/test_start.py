"""Where a block starts: patches as convolutions see them, less loss than nearest rounding, the same twice."""

import logging

import pytest
import torch
from networks import family, images, placed
from torch.nn import functional as F

from metaaug_cli.graph.placement import Bits
from metaaug_cli.quantization import start
from metaaug_cli.quantization.blocks import build_chain, search_activation_scales
from metaaug_cli.quantization.start import _Layer, start_second_order

CONVOLUTIONS = [
    ((8, 6, 3, 3), [1, 1], [1, 1], [1, 1], 1, (5, 6, 9, 8)),
    ((8, 6, 3, 2), [2, 1], [0, 1], [1, 2], 1, (5, 6, 9, 8)),
    ((6, 1, 3, 3), [2, 2], [1, 1], [1, 1], 6, (5, 6, 9, 8)),
    ((8, 3, 1, 1), [2, 1], [0, 0], [1, 1], 2, (5, 6, 9, 8)),
    ((8, 6, 1, 1), [1, 1], [1, 0], [1, 1], 1, (5, 6, 9, 8)),
    ((8, 6, 3), [2], [1], [1], 1, (5, 6, 11)),
]


@pytest.mark.parametrize(("shape", "stride", "padding", "dilation", "groups", "size"), CONVOLUTIONS)
def test_patches_times_weights_are_the_convolution(shape, stride, padding, dilation, groups, size):
    weight, x = torch.randn(shape), torch.randn(size)
    layer = _Layer.of((x, weight, None, stride, padding, dilation, groups))
    seen = layer.patches(x, torch.Generator())
    found = (seen @ weight.view(groups, -1, weight[0].numel()).mT).transpose(0, 1).flatten(1)
    convolution = F.conv1d if len(shape) == 3 else F.conv2d
    expected = convolution(x, weight, None, stride, padding, dilation, groups)
    torch.testing.assert_close(found, expected.movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_linear_layers_see_rows_and_arguments_may_be_left_out():
    x = torch.randn(5, 7)
    assert torch.equal(_Layer.of((x, torch.randn(3, 7))).patches(x, torch.Generator())[0], x)
    x = torch.randn(2, 3, 5, 5)
    assert _Layer.of((x, torch.randn(4, 3, 3, 3), None)).patches(x, torch.Generator()).shape == (1, 18, 27)


def test_large_maps_are_sampled_evenly_over_images(monkeypatch):
    monkeypatch.setattr(start, "_PATCHES", 64)
    monkeypatch.setattr(start, "_LARGEST_CHUNK", 2 * 3 * 9 * 100)
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 10, 10)  # an image is its number
    layer = _Layer.of((x, torch.randn(4, 3, 3, 3), None, [1, 1], [0, 0]))
    seen = layer.patches(x, torch.Generator().manual_seed(0))
    assert seen.shape == (1, 64, 27)
    assert [int((seen[0, :, 0] // 2 == pair).sum()) for pair in range(4)] == [16] * 4
    again = layer.patches(x, torch.Generator().manual_seed(0))
    assert torch.equal(seen, again)


def walked(name, bits, begin):
    """The chain after ``begin(block, h_q, h_fp)`` at each block; the mean squared error of its logits."""
    module = family(name)
    chain = build_chain(module, placed(module, "integer", bits=bits))
    h_q = h_fp = (images(24),)
    with torch.no_grad():
        for block in chain.blocks:
            begin(block, h_q, h_fp)
            h_q, h_fp = block.quantized_block(*h_q), block.float_block(*h_fp)
    return chain, float((h_q[0] - h_fp[0]).square().mean())


def searched_only(block, h_q, h_fp):
    search_activation_scales(block, h_q)


def rounded(block, h_q, h_fp):
    start_second_order(block, h_q, None, seed=block.index)


def corrected(block, h_q, h_fp):
    start_second_order(block, h_q, h_fp, seed=block.index)


@pytest.mark.parametrize("name", ["residual", "mobile", "vgg", "dense", "mixed"])
@pytest.mark.parametrize("bits", [Bits(2, 8), Bits(4, 8)])
def test_networks_come_nearer_to_float_ones(name, bits):
    _, nearest = walked(name, bits, searched_only)
    _, best = walked(name, bits, corrected)
    assert best < 0.9 * nearest


def test_without_float_inputs_each_block_makes_up_for_its_own_rounding():
    module = family("residual")
    errors = []
    for begin in (searched_only, rounded):
        chain = build_chain(module, placed(module, bits=Bits(2, 8)))
        values, lost = (images(24),), []
        for block in chain.blocks:  # every block reads what the float network gives it
            begin(block, values, values)
            with torch.no_grad():
                exact, found = block.float_block(*values), block.quantized_block(*values)
            lost.append(float((found[0] - exact[0]).square().mean()))
            values = exact
        errors.append(lost)
    assert all(b < 0.9 * a for a, b in zip(*errors, strict=True) if a > 1e-3)
    assert sum(a > 1e-3 for a in errors[0]) >= 3


def test_the_same_seed_gives_the_same_codes():
    one, two = (walked("residual", Bits(2, 4), corrected)[0] for _ in range(2))
    for a, b in zip(one.blocks, two.blocks, strict=True):
        assert all(torch.equal(value, b.state()[key]) for key, value in a.state().items())


def test_eight_bit_scales_are_kept_and_powers_of_two_stay_so():
    module = family("residual")
    for power_of_two in (False, True):
        chain = build_chain(module, placed(module, bits=Bits(3, 4)), power_of_two=power_of_two)
        stem, block = chain.blocks[0], chain.blocks[1]
        kept = {name: q.scale.detach().clone() for name, q in stem.weights.items()}
        start_second_order(stem, (images(16),), None, seed=0)
        assert all(q.bits == 8 and torch.equal(q.scale, kept[name]) for name, q in stem.weights.items())
        with torch.no_grad():
            h_q = stem.quantized_block(images(16))
        start_second_order(block, h_q, None, seed=0)
        scales = torch.cat([q.scale.detach() for q in block.weights.values()])
        assert bool((torch.frexp(scales).mantissa == 0.5).all()) == power_of_two


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_beyond_numbers_leave_nearest_rounding(value, caplog):
    module = family("residual")
    chain = build_chain(module, placed(module, bits=Bits(3, 4)))
    stem, x = chain.blocks[0], images(4)
    before = {key: tensor.clone() for key, tensor in stem.state().items() if "weights/" in key}
    x[1] = value
    with caplog.at_level(logging.INFO):
        start_second_order(stem, (x,), None, seed=0)
    assert "keeps nearest rounding" in caplog.text
    assert all(torch.equal(tensor, stem.state()[key]) for key, tensor in before.items())


def test_a_layer_with_too_many_weights_per_output_keeps_nearest_rounding(monkeypatch, caplog):
    nearest, _ = walked("residual", Bits(3, 4), searched_only)
    monkeypatch.setattr(start, "_LARGEST_PATCH", 1)
    with caplog.at_level(logging.INFO):
        chain, _ = walked("residual", Bits(3, 4), rounded)
    assert "keeps nearest rounding" in caplog.text
    for a, b in zip(chain.blocks, nearest.blocks, strict=True):
        assert all(torch.equal(value, b.state()[key]) for key, value in a.state().items())
