"""Learning one block: below the loss of nearest rounding, each method its own parameters, the same twice."""

import math

import pytest
import torch
from networks import SIZE, family, images, placed, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.errors import InputError, MetaAugError
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits
from metaaug_cli.quantization.blocks import build_chain, search_activation_scales
from metaaug_cli.quantization.cache import BlockData, Stream
from metaaug_cli.quantization.reconstruct import (
    Schedule,
    mix,
    probe_loss,
    rate_factor,
    reconstruct_block,
)

CPU = torch.device("cpu")
FAST = {"rate_factor": 25.0, "batch_size": 16}


def residual_block(bits=None, kind="integer"):
    """The first residual block of the network, with inputs and targets of 64 images."""
    module = family("residual")
    chain = build_chain(module, placed(module, kind, bits=bits or Bits(2, 4)))
    stem, block = chain.blocks[0], chain.blocks[1]
    with torch.no_grad():
        search_activation_scales(stem, (images(64),))
        h_fp, h_q = stem.float_block(images(64)), stem.quantized_block(images(64))
        search_activation_scales(block, h_q)
        targets = block.float_block(*h_fp)
    return block, BlockData(Stream(h_fp, CPU), Stream(h_q, CPU), block.float_block, targets, block.computed)


def learn(schedule, seed=0, **options):
    block, data = residual_block(**options)
    history = reconstruct_block(block, data, schedule, generator=torch.Generator().manual_seed(seed))
    return block, data, history


@pytest.mark.parametrize("bits", [Bits(2, 4), Bits(2, 2), Bits(4, 4)])
def test_two_hundred_steps_lower_the_loss_and_beat_nearest_rounding(bits):
    nearest, data = residual_block(bits=bits)
    with torch.no_grad():
        output = nearest.quantized_block(*data.quantized_stream.stored)[0]
        by_hand = float((output - data.targets[0]).square().sum(1).mean())
    block, data, history = learn(Schedule(iterations=200, **FAST), bits=bits)
    assert history.loss_before == pytest.approx(by_hand, rel=1e-4)
    assert history.loss_after < 0.85 * history.loss_before
    with torch.no_grad():  # measured on the block as it is left, hard and undropped
        output = block.quantized_block(*data.quantized_stream.stored)[0]
    after = float((output - data.targets[0]).square().sum(1).mean())
    assert after == pytest.approx(history.loss_after, rel=1e-4)


def test_the_block_ends_hard_rounded_and_on_its_grid():
    block, _, _ = learn(Schedule(iterations=50, **FAST))
    for weight in block.weights.values():
        codes = weight.codes()
        assert torch.equal(codes, codes.round())
        assert set(weight.rounding().unique().tolist()) <= {0.0, 1.0}
        assert not weight.soft
    assert all(a.quant_prob == 1.0 and a.generator is None for a in block.activations.values())


def test_the_regularizer_decides_the_rounding():
    """With it, hardly any soft rounding is left undecided at the end; without it, many are."""
    undecided = {}
    for weight in (0.0, 1.0):
        block, _, _ = learn(Schedule(iterations=200, rounding_weight=weight, **FAST))
        logits = torch.cat([q.rounding_logits.flatten() for q in block.weights.values()])
        soft = torch.sigmoid(logits) * 1.2 - 0.1
        undecided[weight] = float(((soft > 0.05) & (soft < 0.95)).float().mean())
    assert undecided[1.0] < 0.3 < 0.5 < undecided[0.0]


@pytest.mark.parametrize("quant_prob", [0.5, 1.0])
def test_learning_repeats_bit_for_bit(quant_prob):
    schedule = Schedule(iterations=20, quant_prob=quant_prob, **FAST)
    (a, _, first), (b, _, second), (c, _, other) = (learn(schedule, seed) for seed in (3, 3, 4))
    assert first.curve == second.curve
    assert (first.loss_before, first.loss_after) == (second.loss_before, second.loss_after)
    states = [block.state() for block in (a, b, c)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert first.curve != other.curve


def test_learning_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    learn(Schedule(iterations=5, **FAST))
    assert torch.equal(torch.random.get_rng_state(), before)


def moved(schedule):
    block, data = residual_block()
    parameters = {
        "rounding": [q.rounding_logits for q in block.weights.values()],
        "weight scale": [q.relative_scale for q in block.weights.values()],
        "act scale": [q.relative_scale for q in block.activations.values()],
    }
    before = {name: [p.detach().clone() for p in group] for name, group in parameters.items()}
    reconstruct_block(block, data, schedule, generator=torch.Generator().manual_seed(0))
    return {
        name
        for name, group in parameters.items()
        if any(not torch.equal(p.detach(), q) for p, q in zip(group, before[name], strict=True))
    }


def test_each_method_learns_its_own_parameters():
    names = {"rounding", "weight scale", "act scale"}
    assert moved(Schedule(iterations=3)) == names
    assert moved(Schedule(iterations=3, learn_weight_scale=False)) == names - {"weight scale"}
    adaround = Schedule(iterations=3, learn_weight_scale=False, learn_act_scale=False, quant_prob=1.0)
    assert moved(adaround) == {"rounding"}
    assert moved(Schedule(iterations=0)) == set()


def test_no_iterations_change_nothing_and_measure_the_loss():
    _, _, history = learn(Schedule(iterations=0))
    assert history.loss_before == history.loss_after > 0
    assert history.curve == []


def test_first_step_is_that_of_adam_on_the_written_out_loss():
    """One step without drops, again by hand: Adam's first step is the rate times the gradient's sign."""
    schedule = Schedule(
        iterations=1, batch_size=64, quant_prob=1.0, rounding_warmup=0.0, beta_start=3.0, beta_end=2.0
    )
    block, data = residual_block()
    seed = torch.Generator().manual_seed(5)
    torch.randint(2**62, (), generator=seed)  # the seed of the drops is drawn first
    indices = torch.randint(64, (64,), generator=seed)
    expected = {}
    for q in block.weights.values():
        q.soft = True
    output = block.quantized_block(data.quantized_stream.stored[0][indices])[0]
    loss = (output - data.targets[0][indices]).square().sum(1).mean()
    for q in block.weights.values():
        h = torch.clamp(torch.sigmoid(q.rounding_logits) * 1.2 - 0.1, 0, 1)
        loss = loss + (1 - (2 * h - 1).abs() ** 3.0).sum()
    loss.backward()
    for name, q in block.weights.items():
        q.soft = False
        g, s = q.rounding_logits.grad, q.relative_scale.grad
        expected[name] = (
            (q.rounding_logits - 1e-3 * g / (g.abs() + 1e-8)).detach().clone(),
            (q.relative_scale - 1e-3 * s / (s.abs() + 1e-8)).detach().clone(),
        )
        q.zero_grad()
    assert len(expected) == 2
    reconstruct_block(block, data, schedule, generator=torch.Generator().manual_seed(5))
    for name, q in block.weights.items():
        torch.testing.assert_close(q.rounding_logits.detach(), expected[name][0], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(q.relative_scale.detach(), expected[name][1], rtol=1e-5, atol=2e-6)


def test_curve_and_ticks_cover_every_step():
    block, data = residual_block()
    ticks = []
    history = reconstruct_block(
        block,
        data,
        Schedule(iterations=7, **FAST),
        generator=torch.Generator().manual_seed(0),
        tick=lambda i, n: ticks.append((i, n)),
    )
    assert ticks == [(i, 7) for i in range(1, 8)]
    assert [step for step, _ in history.curve] == list(range(7))
    assert all(math.isfinite(loss) and loss > 0 for _, loss in history.curve)
    assert history.seconds > 0


def test_mix_takes_each_element_from_one_of_the_streams():
    quantized, full = torch.full((1000,), 2.0), torch.full((1000,), 1.0)
    (mixed,) = mix((quantized,), (full,), 0.25, torch.Generator().manual_seed(0))
    assert set(mixed.tolist()) == {1.0, 2.0}
    share = float((mixed == 2.0).float().mean())
    assert share == pytest.approx(0.25, abs=0.06)
    (all_quantized,) = mix((quantized,), (full,), 1.0, torch.Generator())
    assert torch.equal(all_quantized, quantized)


def test_mix_draws_each_tensor_separately():
    pairs = (torch.ones(400), torch.ones(400)), (torch.zeros(400), torch.zeros(400))
    first, second = mix(*pairs, 0.5, torch.Generator().manual_seed(0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("iterations", "factor"), [(1, 25), (200, 25), (500, 10), (5000, 1), (20_000, 1)])
def test_rates_belong_to_the_length_of_the_schedule(iterations, factor):
    assert rate_factor(iterations) == factor


def test_probe_weighs_every_image_the_same():
    block, data = residual_block()
    whole = probe_loss(block, data, torch.arange(50), chunk=50)
    assert probe_loss(block, data, torch.arange(50), chunk=7) == pytest.approx(whole, rel=1e-4)


def test_images_that_end_in_nan_are_refused_before_anything_is_learned():
    block, data = residual_block()
    data.targets[0][3] = math.nan
    before = {k: v.clone() for k, v in block.quantized_block.state_dict().items()}
    with pytest.raises(InputError, match=r"layer1\.0: NaN or infinite values for some of the images"):
        reconstruct_block(block, data, Schedule(iterations=5), generator=torch.Generator())
    for key, value in block.quantized_block.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_diverged_prefix_is_not_blamed_on_the_images():
    block, data = residual_block()
    (h_q,) = data.quantized_stream.stored
    h_q[3] = math.inf
    with pytest.raises(MetaAugError, match=r"layer1\.0: learning ended in NaN") as caught:
        reconstruct_block(block, data, Schedule(iterations=5), generator=torch.Generator())
    assert caught.value.exit_code == 3
    assert "lr_scale" in caught.value.hint
    assert "--method gptq" in caught.value.hint


def test_a_block_that_diverges_is_not_kept():
    block, data = residual_block()
    wild = Schedule(iterations=5, weight_scale_lr=1e30, rate_factor=1e6)
    with pytest.raises(MetaAugError, match=r"layer1\.0: learning ended in NaN"):
        reconstruct_block(block, data, wild, generator=torch.Generator())


class Rooted(nn.Module):
    """Generalised-mean pooling: the root of a mean that a grid rounds to 0."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.power = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        power = self.power.abs() + 2.0
        x = F.relu(self.conv(x) - 1.0).clamp(min=1e-6).pow(power).mean((2, 3), keepdim=True)
        return self.head(x.pow(1.0 / power).flatten(1))


@pytest.mark.parametrize("bits", [Bits(4, 4), Bits(8, 8)])
def test_a_root_of_what_a_grid_rounds_to_zero_is_learned(bits):
    module = capture(trained(Rooted()), SIZE)
    chain = build_chain(module, placed(module, bits=bits))
    h_fp, h_q = (images(64),), (images(64),)
    for block in chain.blocks:
        with torch.no_grad():
            search_activation_scales(block, h_q)
            targets = block.float_block(*h_fp)
        data = BlockData(Stream(h_fp, CPU), Stream(h_q, CPU), block.float_block, targets, block.computed)
        schedule = Schedule(iterations=60, **FAST)
        history = reconstruct_block(block, data, schedule, generator=torch.Generator().manual_seed(0))
        assert history.loss_after < history.loss_before
        with torch.no_grad():
            h_fp, h_q = targets, block.quantized_block(*h_q)
    assert any("finite_gradient" in block.quantized_block.code for block in chain.blocks)


def test_an_error_inside_a_step_leaves_the_block_usable():
    block, data = residual_block()

    def interrupt(step, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct_block(block, data, Schedule(iterations=3), generator=torch.Generator(), tick=interrupt)
    assert all(not q.soft for q in block.weights.values())
    assert all(a.quant_prob == 1.0 for a in block.activations.values())
