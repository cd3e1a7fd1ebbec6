"""Teaching the augmenter: T moves and the block does not, the same twice, and what is recorded."""

import math

import pytest
import torch
from augmenters import INNER, PICTURES, data_of, learned_augmentation, teach

from metaaug_cli.augmentation.meta import _draw


def parameters(learned):
    return [p.detach().clone() for p in learned.augmenter.parameters()]


def test_t_moves_and_the_block_stays():
    learned = learned_augmentation()
    block, _ = data_of(learned, 1)
    before = parameters(learned)
    state = {name: value.clone() for name, value in block.quantized_block.state_dict().items()}
    teach(learned)
    # A zero output layer passes no gradient on, so in the first step only that layer can move.
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(learned), strict=True))
    for name, value in block.quantized_block.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(not q.soft for q in block.weights.values())
    assert all(q.quant_prob == 1.0 and not q.twice_differentiable for q in block.activations.values())


@pytest.mark.parametrize("form", ["residual", "unet", "policy"])
def test_teaching_repeats_bit_for_bit_under_a_seed(form):
    runs = []
    for seed in (3, 3, 4):
        learned = learned_augmentation(form)
        history = teach(learned, seed=seed)
        runs.append((parameters(learned), history.records))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]
    assert runs[0][1] != runs[2][1]


def test_teaching_leaves_the_global_generator_alone():
    learned = learned_augmentation("policy")
    before = torch.random.get_rng_state()
    teach(learned)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_recorded():
    learned = learned_augmentation(steps=4)
    history = teach(learned)
    assert [r.step for r in history.records] == [0, 1, 2, 3]
    first = history.records[0]
    assert first.distance == 0.0, "the residual form starts at the identity"
    assert all(r.distance > 0 for r in history.records[1:])
    for record in history.records:
        assert math.isfinite(record.validation)
        assert record.validation != record.validation_before
        assert len(record.gradients) == 3
        assert record.gradients[0] > 0
    assert history.seconds > 0


def test_records_are_few_in_a_long_schedule_and_none_where_nothing_is_measured():
    learned = learned_augmentation(steps=60)
    learned.learner._step = lambda *_, measure: torch.ones(7 if measure else 4)
    block, data = data_of(learned, 1)
    ticks = []
    history = learned.learner.learn(
        block, data, INNER, generator=torch.Generator(), tick=lambda i, n: ticks.append((i, n))
    )
    assert 25 <= len(history.records) <= 30
    assert ticks == [(i, 60) for i in range(1, 61)]
    silent = learned.learner.learn(block, data, INNER, generator=torch.Generator(), measured=False)
    assert silent.records == []


@pytest.mark.parametrize("balanced", [True, False])
def test_weights_scale_the_terms(balanced):
    learner = learned_augmentation(balanced=balanced, preserve_weight=0.0).learner
    gradients = tuple(torch.full((2, 2), value) for value in (3.0, 1e-3, 7.0))
    weighted = learner._weighted(gradients)
    if balanced:  # the first step's norm is the usual one
        assert [float(w.norm()) for w in weighted] == pytest.approx([1.0, 3.0, 0.0])
    else:
        assert [float(w.mean()) for w in weighted] == pytest.approx([15.0, 5e-4, 0.0])


def test_balance_divides_by_the_usual_norm_not_by_the_present_one():
    learner = learned_augmentation().learner
    ones = tuple(torch.ones(4) for _ in range(3))
    learner._weighted(ones)
    sudden = learner._weighted(tuple(10 * one for one in ones))
    norms, share = (2.0, 20.0), 1.0
    usual = (0.9 * 0.1 * norms[0] + 0.1 * norms[1]) / (1 - 0.9**2)
    assert float(sudden[0].norm()) == pytest.approx(share * norms[1] / usual, rel=1e-4)


def test_the_step_on_t_is_clipped():
    learned = learned_augmentation(grad_clip=1e-9, steps=1)
    teach(learned)
    total = sum(float(p.grad.square().sum()) for p in learned.augmenter.parameters())
    assert 0 < math.sqrt(total) <= 1.001e-9


def test_images_are_drawn_once_while_there_are_enough():
    generator = torch.Generator().manual_seed(0)
    drawn = _draw(len(PICTURES), 12, generator)
    assert sorted(drawn.tolist()) == list(range(12))
    many = _draw(3, 20, generator)
    assert len(many) == 20
    assert set(many.tolist()) <= {0, 1, 2}
