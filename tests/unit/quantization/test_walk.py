"""The images' way through the chain: copies that join late are where they had been from the start."""

import pytest
import torch
from networks import family, images, searched

from metaaug_cli.quantization.cache import Budget, stage_bytes
from metaaug_cli.quantization.walk import Lane, Walker

CPU = torch.device("cpu")
ORIGINALS, COPIES = images(6), images(9, seed=2)
HELD_BACK = images(4, seed=3)
NOTHING = images(0)
PLENTY = 2**30


def walker(walked, room=PLENTY, *, originals=6, held_back=NOTHING):
    return Walker(walked, originals, held_back, CPU, Budget(CPU, room, 0))


def walk_to(made, blocks, index):
    """Data of block ``index`` after entering and leaving all before it."""
    for block in blocks[:index]:
        made.enter(block, learns=True)
        made.leave(block)
    return made.enter(blocks[index], learns=True)


def everything(data):
    return data.batch(torch.arange(len(data.float_stream)))


def assert_same(data, other):
    for values, expected in zip(everything(data), everything(other), strict=True):
        assert len(values) == len(expected) > 0
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def blocks():
    return searched(family("residual")).blocks


@pytest.mark.parametrize("room", ["for all", "for all of this block", "for its originals", "for nothing"])
@pytest.mark.parametrize("index", [1, 3])
def test_copies_that_join_late_are_where_they_had_been_from_the_start(blocks, room, index):
    block = blocks[index]
    place = {
        "for all": PLENTY,
        "for all of this block": stage_bytes(block.stage, len(ORIGINALS) + len(COPIES)),
        "for its originals": stage_bytes(block.stage, len(ORIGINALS)),
        "for nothing": 0,
    }[room]
    late = walker(ORIGINALS, place)
    walk_to(late, blocks, index)
    data = late.with_copies(block, COPIES)
    early = walk_to(walker(torch.cat([ORIGINALS, COPIES])), blocks, index)
    assert_same(data, early)
    assert len(data) == len(ORIGINALS)
    assert len(data.float_stream) == 15


def test_joining_copies_nothing(blocks):
    lanes = [Lane(pictures, CPU) for pictures in (ORIGINALS, COPIES)]
    for lane in lanes:
        lane.enter(blocks[0], CPU)
    joined = lanes[0].joined(lanes[1])
    for name in ("float_stream", "quantized_stream"):
        (parts,) = getattr(joined, name).stored
        assert parts.first is getattr(lanes[0], name).stored[0]
        assert parts.second is getattr(lanes[1], name).stored[0]
    (targets,) = joined.targets
    assert [targets.first.data_ptr(), targets.second.data_ptr()] == [x.targets[0].data_ptr() for x in lanes]


def test_joined_images_come_in_the_order_asked_for(blocks):
    made = walker(ORIGINALS)
    walk_to(made, blocks, 1)
    data = made.with_copies(blocks[1], COPIES)
    order = torch.tensor([14, 0, 3, 9, 3, 6, 5, 14])
    for values, rows in zip(data.batch(order), everything(data), strict=True):
        for value, row in zip(values, rows, strict=True):
            torch.testing.assert_close(value, row[order], rtol=1e-5, atol=1e-6)
    only_copies = data.batch(order[order > 5])[0][0]
    torch.testing.assert_close(only_copies, everything(data)[0][0][order[order > 5]], rtol=1e-5, atol=1e-6)


def test_the_originals_walk_on_alone_after_copies_joined(blocks):
    made, plain = walker(ORIGINALS), walker(ORIGINALS)
    walk_to(made, blocks, 1)
    made.with_copies(blocks[1], COPIES)
    made.leave(blocks[1])
    assert_same(made.enter(blocks[2], learns=True), walk_to(plain, blocks, 2))


@pytest.mark.parametrize("room", [PLENTY, 0])
def test_held_back_images_walk_beside_the_others(blocks, room):
    made = walker(ORIGINALS, room, held_back=HELD_BACK)
    data = walk_to(made, blocks, 2)
    assert_same(made.held_back_data(blocks[2]), walk_to(walker(HELD_BACK, originals=4), blocks, 2))
    assert_same(data, walk_to(walker(ORIGINALS), blocks, 2))
    assert len(made.held_back_data(blocks[2])) == 4


def test_without_held_back_images_there_is_nothing_to_measure(blocks):
    made = walker(ORIGINALS)
    walk_to(made, blocks, 0)
    assert made.held_back_data(blocks[0]) is None


def test_fixed_copies_walk_along_and_only_originals_count(blocks):
    data = walk_to(walker(torch.cat([ORIGINALS, COPIES])), blocks, 2)
    assert len(data) == 6
    drawn = data.draw(400, torch.Generator().manual_seed(0))
    assert int((drawn < 6).sum()) == 200
    assert int(drawn.max()) == 14


def test_only_blocks_that_learn_are_warned_about(blocks, caplog):
    made = walker(ORIGINALS, 0)
    made.enter(blocks[0], learns=False)
    assert caplog.records == []
    made.enter(blocks[0], learns=True)
    assert "recomputed each step" in caplog.text
