"""The plan of a run: what it says about each block, and that saying it changes nothing."""

import pytest
import torch
from networks import SIZE, family, placed

from metaaug_cli.augmentation.augmenter import AugmenterSpec
from metaaug_cli.augmentation.bilevel import MetaSchedule
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.planning import TeachingPlan, _extrapolated, plan_run
from metaaug_cli.quantization.blocks import build_chain
from metaaug_cli.quantization.reconstruct import Schedule

CPU = torch.device("cpu")


def plan(name="vgg", schedule=None, kind="integer", **options):
    module = family(name)
    chain = build_chain(module, placed(module, kind, bits=Bits(2, 4)), **options)
    return chain, plan_run(chain, schedule or Schedule(iterations=0), images=10, device=CPU)


def test_rows_by_hand():
    _, rows = plan()
    assert [r.block for r in rows] == [*(f"features.{i}" for i in (0, 3, 5)), "classifier.0", "classifier.3"]
    assert [r.layers for r in rows] == [1] * 5
    assert [r.parameters for r in rows] == [4 * 27 + 4, 6 * 36 + 6, 6 * 54 + 6, 24 * 8 + 8, 8 * 5 + 5]
    assert [r.weight_bits for r in rows] == [(8,), (2,), (2,), (2,), (8,)]
    assert [r.macs for r in rows] == [6912, 3456, 5184, 192, 40]
    # 10 images × 4 bytes × (two inputs and a target)
    assert rows[0].cache_bytes == 10 * 4 * (2 * 192 + 64)
    assert rows[-1].cache_bytes == 10 * 4 * (2 * 8 + 5)
    assert [r.seconds for r in rows] == [None] * 5


def test_copies_are_kept_where_a_block_learns_from_them():
    teaching = TeachingPlan(
        AugmenterSpec("residual", base_width=4),
        MetaSchedule(steps=1, batch_size=2, val_batch_size=2),
        Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.5,) * 3),
    )

    def kept(**options):
        chain = build_chain(family("residual"), placed(family("residual"), bits=Bits(2, 2)))
        rows = plan_run(chain, Schedule(iterations=0), images=10, device=CPU, **options)
        return [r.cache_bytes for r in rows]

    plain = kept()
    assert kept(copies=20) == [3 * n for n in plain]
    assert kept(copies=20, teaching=teaching) == [plain[0], *(3 * n for n in plain[1:])]


def test_activation_bits_are_those_of_the_grids_each_block_owns():
    chain, rows = plan("residual", kind="academic")
    for block, row in zip(chain.blocks, rows, strict=True):
        assert row.act_bits == tuple(sorted({q.bits for q in block.activations.values()}))
    assert [r.act_bits for r in rows] == [(), (4,), (4,), (4,), (8,)]


def test_parameters_are_those_of_the_folded_network():
    _, rows = plan("mobile")
    expected = sum(t.numel() for t in family("mobile").buffers())
    assert sum(r.parameters for r in rows) == expected


def test_seconds_grow_with_the_schedule():
    def total(iterations):
        _, rows = plan("residual", Schedule(iterations=iterations, batch_size=32))
        assert all(r.seconds > 0 for r in rows)
        return sum(r.seconds for r in rows)

    assert total(10_000) > 5 * total(100)


def test_teaching_an_augmenter_is_timed_where_a_block_teaches():
    def seconds(steps):
        teaching = TeachingPlan(
            AugmenterSpec("residual", base_width=4),
            MetaSchedule(steps=steps, batch_size=8, val_batch_size=8),
            Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.5,) * 3),
        )
        chain = build_chain(family("residual"), placed(family("residual"), bits=Bits(2, 2)))
        rows = plan_run(chain, Schedule(iterations=5), images=10, device=CPU, teaching=teaching)
        assert [r.augmenter_seconds is None for r in rows] == [b.is_edge for b in chain.blocks]
        return sum(r.augmenter_seconds or 0 for r in rows)

    assert seconds(10_000) > 5 * seconds(100) > 0


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_planning_leaves_what_is_learned_alone(name):
    module = family(name)
    chain = build_chain(module, placed(module), max_layers=2)
    weights = [q.state() for b in chain.blocks for q in b.weights.values()]
    plan_run(chain, Schedule(iterations=5), images=10, device=CPU)
    for before, quantizer in zip(weights, (q for b in chain.blocks for q in b.weights.values()), strict=True):
        for key, value in quantizer.state().items():
            assert torch.equal(value, before[key])
    assert all(q.quant_prob == 1.0 for b in chain.blocks for q in b.activations.values())


def test_a_block_that_random_inputs_break_is_planned_all_the_same():
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4))
            self.last = torch.nn.Linear(4, 5)

        def forward(self, x):
            x = torch.relu(self.first(x)) + 1.0
            return self.last((x + self.second(torch.sqrt(x - 1.0))).mean((2, 3)))

    module = capture(Root().eval(), SIZE)
    chain = build_chain(module, placed(module, bits=Bits(4, 4)))
    rows = plan_run(chain, Schedule(iterations=4, batch_size=2), images=4, device=CPU)
    assert all(row.seconds > 0 for row in rows)


def test_the_part_of_a_step_that_does_not_grow_is_counted_once():
    assert _extrapolated({4: 1.4, 8: 1.8}, 32) == pytest.approx(1.0 + 32 * 0.1)
    assert _extrapolated({4: 1.8, 8: 1.4}, 32) == 1.4, "noise is no reason to promise less than was seen"
    assert _extrapolated({32: 2.0}, 32) == 2.0


def test_timing_the_blocks_leaves_them_as_they_were():
    module = family("residual")
    chain = build_chain(module, placed(module, bits=Bits(2, 2)))
    weights = {(b.name, n): p.clone() for b in chain.blocks for n, p in b.quantized_block.named_parameters()}
    plan_run(chain, Schedule(iterations=10, batch_size=2), images=4, device=CPU)
    for block in chain.blocks:
        for name, value in block.quantized_block.named_parameters():
            assert torch.equal(value, weights[block.name, name]), (block.name, name)
        assert all(not q.soft for q in block.weights.values())
        assert all(p.grad is None for p in block.quantized_block.parameters())
        assert all(q.generator is None and q.quant_prob == 1.0 for q in block.activations.values())
