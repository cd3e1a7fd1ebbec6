"""QDrop's random masks: their probability, their independence, and their order in memory."""

import math

import pytest
import torch

from metaaug_cli.quantization.drops import Drops, drop_mask


@pytest.mark.parametrize("prob", [0.0, 0.25, 0.5, 0.999, 1.0])
def test_mask_is_drawn_with_the_asked_probability(prob):
    mask = drop_mask(torch.empty(101, 333), prob, torch.Generator().manual_seed(3))
    assert mask.shape == (101, 333)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = math.sqrt(prob * (1 - prob) / mask.numel())
    assert float(mask.mean()) == pytest.approx(prob, abs=1 / 512 + 4 * deviation)


def test_mask_elements_are_independent_and_follow_the_generator():
    def draw(seed):
        return drop_mask(torch.empty(80_000), 0.5, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    centred = draw(1) - 0.5
    for lag in (1, 2, 7, 8, 16):  # eight draws share one random word
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 4 * 0.25 / math.sqrt(80_000)


def test_a_mask_follows_memory_not_the_shape():
    """The same bytes in the same places of memory, so that pieces of memory can be masked one by one."""
    usual = torch.empty(2, 3, 4, 5)
    turned = usual.contiguous(memory_format=torch.channels_last)
    masks = [drop_mask(like, 0.5, torch.Generator().manual_seed(1)) for like in (usual, turned)]
    assert masks[0].stride() == usual.stride()
    assert masks[1].stride() == turned.stride()
    assert torch.equal(masks[0].flatten(), masks[1].permute(0, 2, 3, 1).flatten())


def test_pieces_are_those_of_the_mask_and_kept_is_the_opposite():
    like = torch.empty(101)
    drops = Drops.draw(like, 0.25, torch.Generator().manual_seed(5))
    mask = drop_mask(like, 0.25, torch.Generator().manual_seed(5))
    for piece in (slice(0, 40), slice(40, 101)):
        assert torch.equal(drops.quantized(piece, like[piece]), mask[piece])
        assert torch.equal(drops.kept(piece, like[piece]), 1 - mask[piece])
    assert Drops.draw(like, 1.0, None) is None
