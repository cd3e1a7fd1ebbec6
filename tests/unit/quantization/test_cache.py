"""Streams give the same values whether they are stored or recomputed, and the budget decides which."""

import pytest
import torch
from networks import family, images, placed

from metaaug_cli.layout import fast_layout
from metaaug_cli.quantization.blocks import build_chain
from metaaug_cli.quantization.cache import (
    BlockData,
    Budget,
    Parts,
    Stream,
    default_budget,
    place_for,
    stage_bytes,
)

CPU = torch.device("cpu")
COUNT = 150  # more than two chunks


class Counted:
    """A step that notes how often and on how many images it ran."""

    def __init__(self, step):
        self.step, self.sizes = step, []

    def __call__(self, *values):
        self.sizes.append(len(values[0]))
        return self.step(*values)


def double_and_sum(x):
    return 2 * x, x.sum(1)


def product(x, y):
    return (x * y[:, None],)


@pytest.mark.parametrize("places", [(None, None), (CPU, CPU), (None, CPU), (CPU, None)])
def test_batches_are_the_same_stored_and_recomputed(places):
    x = torch.arange(3.0 * COUNT).view(COUNT, 3)
    stream = Stream((x,), CPU)
    for step, place in zip((double_and_sum, product), places, strict=True):
        stream.advance(step, place=place)
    indices = torch.tensor([149, 0, 64, 63, 64])
    (result,) = stream.batch(indices)
    assert torch.equal(result, 2 * x[indices] * x[indices].sum(1, keepdim=True))
    assert len(stream) == COUNT


def test_storing_runs_each_image_once_and_recomputing_only_what_is_asked():
    x = torch.rand(COUNT, 3)
    stored, recomputed = Counted(double_and_sum), Counted(double_and_sum)
    kept, lazy = Stream((x,), CPU), Stream((x,), CPU)
    kept.advance(stored, place=CPU)
    lazy.advance(recomputed, place=None)
    assert sum(stored.sizes) == COUNT
    assert max(stored.sizes) <= 64
    assert recomputed.sizes == []
    for stream in (kept, lazy):
        stream.batch(torch.tensor([1, 2]))
        stream.batch(torch.tensor([3]))
    assert sum(stored.sizes) == COUNT
    assert recomputed.sizes == [2, 1]


def test_a_stream_that_was_recomputed_can_be_kept_later():
    x = torch.rand(COUNT, 3)
    step = Counted(double_and_sum)
    stream = Stream((x,), CPU)
    stream.advance(step, place=None)
    before = stream.batch(torch.arange(10))
    stream.keep(CPU)
    assert stream.pending == []
    runs = len(step.sizes)
    after = stream.batch(torch.arange(10))
    assert len(step.sizes) == runs
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_streams_build_no_autograd_graph():
    x = torch.rand(4, 3, requires_grad=True)
    stream = Stream((x,), CPU)
    stream.advance(lambda t: (t * 2,), place=None)
    assert not stream.batch(torch.arange(2))[0].requires_grad


@pytest.mark.parametrize(
    ("needed", "expected"), [(100, torch.device("meta")), (101, CPU), (200, CPU), (201, None)]
)
def test_place_is_the_device_then_the_host_then_nowhere(needed, expected):
    assert place_for(needed, Budget(torch.device("meta"), 100, 200)) == expected


def test_budget_from_gibibytes_and_from_free_memory():
    assert default_budget(CPU, 1.5) == Budget(CPU, int(1.5 * 2**30), 0)
    assert default_budget(CPU, 0.0).device_bytes == 0
    free = default_budget(CPU, None).device_bytes
    assert 2**20 < free < 2**50


def test_bytes_of_a_block():
    module = family("residual")
    blocks = build_chain(module, placed(module)).blocks
    # 3×8×8 floats an image become 6×8×8: when images leave, one input and both outputs are there
    assert stage_bytes(blocks[0].stage, 10) == 10 * 4 * (192 + 2 * 384)
    # 6×8×8 become 8×4×4: while the block learns, both inputs and the target
    assert stage_bytes(blocks[2].stage, 1) == 4 * (2 * 384 + 8 * 16)


@pytest.mark.parametrize("stored", [True, False])
def test_block_data_gives_inputs_and_the_targets_the_block_computes(stored):
    module = family("dense")
    block = build_chain(module, placed(module), max_layers=2).blocks[1]
    assert (len(block.stage.inputs), len(block.stage.outputs), block.computed) == (1, 3, (1, 2))
    h_fp, h_q = images(COUNT, (4, 8, 8)), images(COUNT, (4, 8, 8), seed=2)
    targets = None
    if stored:
        with torch.no_grad():
            targets = block.float_block(h_fp)
    data = BlockData(Stream((h_fp,), CPU), Stream((h_q,), CPU), block.float_block, targets, block.computed)
    indices = torch.tensor([5, 140, 5])
    got_fp, got_q, got_targets = data.batch(indices)
    assert torch.equal(got_fp[0], h_fp[indices])
    assert torch.equal(got_q[0], h_q[indices])
    with torch.no_grad():
        expected = block.float_block(h_fp[indices])
    assert len(got_targets) == 2
    for value, output in zip(got_targets, expected[1:], strict=True):
        torch.testing.assert_close(value, output, rtol=1e-5, atol=1e-6)
    assert len(data) == COUNT


def test_batches_are_half_originals_and_half_copies():
    stream = Stream((torch.rand(40, 3),), CPU)
    plain = BlockData(stream, stream, double_and_sum, None, (0,))
    mixed = BlockData(stream, stream, double_and_sum, None, (0,), originals=10)
    assert (len(plain), len(mixed)) == (40, 10)
    drawn = torch.stack([mixed.draw(8, torch.Generator().manual_seed(i)) for i in range(50)])
    assert ((drawn < 10).sum(1) == 4).all()
    odd = torch.stack([mixed.draw(9, torch.Generator().manual_seed(i)) for i in range(50)])
    assert set((odd < 10).sum(1).tolist()) == {4, 5}
    single = torch.cat([mixed.draw(1, torch.Generator().manual_seed(i)) for i in range(50)])
    assert 10 < int((single < 10).sum()) < 40
    assert set(drawn.flatten().tolist()) == set(range(40))
    everything = torch.cat([plain.draw(9, torch.Generator().manual_seed(i)) for i in range(50)])
    assert set(everything.tolist()) == set(range(40))


@pytest.mark.parametrize("joined", [False, True])
def test_stored_images_and_their_batches_keep_their_channels_last(joined):
    images_ = torch.randn(COUNT, 3, 4, 4)
    stream = Stream((fast_layout(images_),), CPU)
    stream.advance(lambda x: (2 * x,), place=CPU)
    if joined:
        stream.stored = (Parts(stream.stored[0][:70], stream.stored[0][70:]),)
    indices = torch.tensor([149, 0, 64, 63, 64, 70])
    (batch,) = stream.batch(indices)
    assert torch.equal(batch, 2 * images_[indices])
    assert batch.is_contiguous(memory_format=torch.channels_last)
