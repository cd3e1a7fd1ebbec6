"""The bi-level step: its gradient against finite differences and a plain unrolled step; terms and traps."""

import math
from dataclasses import replace

import pytest
import torch
from networks import family, images, placed
from torch import nn
from torch.nn import functional as F

from metaaug_cli.augmentation import bilevel as module_under_test
from metaaug_cli.augmentation.bilevel import BiLevel, MetaSchedule, inner_mode
from metaaug_cli.augmentation.passes import Passes
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits, place
from metaaug_cli.quantization import functional, quantizers
from metaaug_cli.quantization.blocks import build_chain, search_activation_scales
from metaaug_cli.quantization.reconstruct import LEAST_LEARNED_FACTOR, Schedule

RADIUS = 0.3
FLOAT64 = torch.float64
INNER = Schedule(iterations=50, rate_factor=25.0, quant_prob=0.5)


def chain_of(module, bits=None):
    """The chain in float64 with all scales searched, and its passes."""
    chain = build_chain(module, placed(module, "academic", bits=bits or Bits(2, 2)))
    values = (images(32),)
    with torch.no_grad():
        for block in chain.blocks:
            search_activation_scales(block, values)
            values = block.quantized_block(*values)
    for block in chain.blocks:
        block.float_block.double()
        block.quantized_block.double()
    return chain, Passes(chain.blocks)


@pytest.fixture(scope="module")
def residual():
    return chain_of(family("residual"))


@pytest.fixture
def smooth(monkeypatch):
    """Rounding left out, so that a finite difference sees what the straight-through gradient assumes."""
    monkeypatch.setattr(functional, "round_ste", lambda x: x)
    monkeypatch.setattr(
        quantizers, "drop_fake_quantize", lambda *tensors, **_: functional.fake_quantize(*tensors)
    )


def outer_of(chain, passes, made, schedule, *, index=1, direction=None, seed=3, inner=INNER, measure=False):
    """One outer evaluation with the same random drops each time."""
    x, x_val = images(6, seed=1).double(), images(8, seed=2).double()
    block = chain.blocks[index]
    with torch.no_grad():
        _, h_val = passes.prefixes(x_val, index)
        views, val_views = passes.rest((x,), 0), passes.rest((x_val,), 0)
    drops = torch.Generator().manual_seed(seed)
    level = BiLevel(block, passes, inner, schedule, RADIUS, drops)
    if direction is not None:
        level._direction = direction
    with inner_mode(block, inner.quant_prob, drops):
        return level, level.outer(x, made.clone(), views, h_val, val_views, measure=measure)


def changed(scale=0.2):
    noise = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=FLOAT64)
    return images(6, seed=1).double() + scale * noise


def frozen_directions(chain, passes, made, schedule):
    """The preconditioner of the first step as constants, and a direction function that uses them."""
    held = {}

    def capture_direction(name, gradient):
        level = holder[0]
        found = BiLevel._direction(level, name, gradient)
        held[name] = (found / gradient).detach()
        return found

    holder = []
    original = BiLevel.__init__

    def init(self, *arguments):
        original(self, *arguments)
        holder.append(self)

    BiLevel.__init__ = init
    try:
        outer_of(chain, passes, made, schedule, direction=capture_direction)
    finally:
        BiLevel.__init__ = original
    return lambda name, gradient: gradient * torch.nan_to_num(held[name])


@pytest.mark.parametrize("inner", ["preconditioned", "sgd"])
def test_the_validation_gradient_is_the_finite_difference(residual, smooth, monkeypatch, inner):
    chain, passes = residual
    schedule = MetaSchedule(inner=inner)
    made = changed()
    with torch.no_grad():  # detached in the inner loss, so a finite difference has to hold them still
        targets = chain.blocks[1].float_block(*passes.prefixes(made, 1)[0])
    original = module_under_test.reconstruction_loss
    monkeypatch.setattr(
        module_under_test, "reconstruction_loss", lambda outputs, _, axes: original(outputs, targets, axes)
    )
    direction = frozen_directions(chain, passes, made, schedule)
    gradient = outer_of(chain, passes, made, schedule, direction=direction)[1].gradients[0]
    towards = torch.randn(made.shape, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    step = 1e-6
    ends = [
        float(
            outer_of(chain, passes, made + sign * step * towards, schedule, direction=direction)[1].validation
        )
        for sign in (1, -1)
    ]
    assert float((gradient * towards).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize(("preservation", "term"), [("dp", 2), ("kl", 2), ("mse", 2), ("dp", 1)])
def test_the_other_gradients_are_finite_differences(residual, preservation, term):
    chain, passes = residual
    schedule = MetaSchedule(preservation=preservation, val_weight=0.0)
    made, step = changed(0.1), 1e-6
    towards = torch.randn(made.shape, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    found = outer_of(chain, passes, made, schedule)[1]

    def value(at):
        outer = outer_of(chain, passes, at, schedule)[1]
        return float(outer.preservation if term == 2 else (RADIUS - outer.distance).clamp(min=0))

    difference = (value(made + step * towards) - value(made - step * towards)) / (2 * step)
    assert float((found.gradients[term] * towards).sum()) == pytest.approx(difference, rel=1e-4)


class Plain(nn.Module):
    """Three layers in a row, whose middle one is written out by hand below."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        y = torch.relu(self.middle(torch.relu(self.stem(x))))
        return self.fc(y.mean((2, 3)))


def round_straight(x):
    return x + (x.round() - x).detach()


def test_the_validation_gradient_is_that_of_a_plain_unrolled_step():
    torch.manual_seed(0)
    net = Plain().eval()
    graph = capture(net, (3, 8, 8))
    placement = place(graph.graph, kind="academic", bits=Bits(2, 2), act_symmetric=True)
    chain = build_chain(graph, placement)
    values = (images(32),)
    with torch.no_grad():
        for block in chain.blocks:
            search_activation_scales(block, values)
            values = block.quantized_block(*values)
    for block in chain.blocks:
        block.float_block.double()
        block.quantized_block.double()
    net.double()
    passes = Passes(chain.blocks)
    index = next(b.index for b in chain.blocks if "middle" in b.name)
    block = chain.blocks[index]
    (weight,), (act,) = block.weights.values(), block.activations.values()
    inner = replace(INNER, quant_prob=1.0)
    made, rates = changed(), (1e-3 * 25, 1e-3 * 25, 1e-4 * 25)
    schedule = MetaSchedule(inner="sgd")
    _, outer = outer_of(chain, passes, made, schedule, index=index, inner=inner)

    # From here on nothing of the package computes anything: plain formulas on plain tensors.
    base, zero, step = weight.base, weight.zero_point.view(-1, 1, 1, 1), weight.base_scale
    logits = weight.rounding_logits.detach().clone().requires_grad_()
    weight_scale = torch.ones_like(step).requires_grad_()
    act_scale = torch.ones((), dtype=FLOAT64).requires_grad_()

    def quantized_middle(h, v, s_w, s_a):
        scale = act.base_scale * s_a
        codes = round_straight(h / scale)
        codes = torch.where(codes > 3, torch.full_like(codes, 3.0), codes)  # unsigned: nothing is below 0
        h = codes * scale
        rounded = torch.clamp(base + (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1) + zero, 0, 3) - zero
        channel = (step * s_w).view(-1, 1, 1, 1)
        bias_step = scale * step * s_w
        bias = round_straight(net.middle.bias / bias_step) * bias_step
        return torch.relu(F.conv2d(h, rounded * channel, bias, padding=1))

    def stem(x, quantized):
        kernel, bias = net.stem.weight, net.stem.bias
        if quantized:
            kernel = chain.blocks[0].quantized_block.get_submodule("weight_0")().detach()
        return torch.relu(F.conv2d(x, kernel, bias, padding=1))

    x_made = made.clone().requires_grad_()
    target = torch.relu(F.conv2d(stem(x_made, False), net.middle.weight, net.middle.bias, padding=1)).detach()
    output = quantized_middle(stem(x_made, True), logits, weight_scale, act_scale)
    loss = (output - target).square().sum(1).mean()
    parameters = (logits, weight_scale, act_scale)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    moved = [
        p - rate * g / g.detach().square().mean().sqrt()
        for p, rate, g in zip(parameters, rates, gradients, strict=True)
    ]
    x_val = images(8, seed=2).double()
    logits_q = net.fc(quantized_middle(stem(x_val, True), *moved).mean((2, 3)))
    wanted = (net(x_val) / 4).softmax(-1)
    kl = (wanted * (wanted.log() - (logits_q / 4).log_softmax(-1))).sum(-1).mean()
    (by_hand,) = torch.autograd.grad(kl, x_made)
    assert float(outer.validation) == pytest.approx(float(kl.detach()), rel=1e-9)
    assert float(by_hand.norm()) > 0
    torch.testing.assert_close(outer.gradients[0], by_hand, rtol=1e-7, atol=1e-15)


def test_a_fresh_adam_step_sends_almost_nothing(residual):
    """The trap of the released code: lr * g / (|g| + 1e-8) hardly depends on g."""
    chain, passes = residual
    norms = {
        inner: float(outer_of(chain, passes, changed(), MetaSchedule(inner=inner))[1].gradients[0].norm())
        for inner in ("adam-fresh", "preconditioned", "sgd")
    }
    assert norms["preconditioned"] > 30 * norms["adam-fresh"]
    assert norms["sgd"] > 30 * norms["adam-fresh"]


@pytest.mark.parametrize("inner", ["adam-fresh", "preconditioned", "sgd"])
def test_the_inner_step_descends(residual, inner):
    chain, passes = residual
    made = changed(0.0)
    level, _ = outer_of(chain, passes, made, MetaSchedule(inner=inner, inner_rate=0.02, restart_every=10))
    x = made.requires_grad_()
    h_fp, h_q = passes.prefixes(x, 1)
    targets = level.block.float_block(*h_fp)
    undropped = replace(INNER, quant_prob=1.0)
    level.inner = undropped
    level.restart()
    with inner_mode(level.block, 1.0, level.drops):
        before = level.training_loss(level.params, h_fp, h_q, targets)
        after = level.training_loss(level.step(before), h_fp, h_q, targets)
    assert float(after.detach()) < float(before.detach())


def test_a_fresh_adam_step_is_torchs_first_adam_step(residual):
    chain, passes = residual
    level, _ = outer_of(chain, passes, changed(), MetaSchedule(inner="adam-fresh", val_weight=0.0))
    level.restart()
    loss = sum(
        (p * torch.arange(1.0, p.numel() + 1, dtype=FLOAT64).view_as(p)).sum() for p in level.params.values()
    )
    moved = level.step(loss)
    groups = [
        {"params": [p.detach().clone().requires_grad_()], "lr": level.rates[n]}
        for n, p in level.params.items()
    ]
    optimizer = torch.optim.Adam(groups)
    for group in groups:
        p = group["params"][0]
        p.grad = torch.arange(1.0, p.numel() + 1, dtype=FLOAT64).view_as(p)
    optimizer.step()
    for group, found in zip(groups, moved.values(), strict=True):
        torch.testing.assert_close(found, group["params"][0], rtol=1e-9, atol=1e-12)


def test_preconditioned_steps_divide_by_the_running_second_moment(residual):
    """Adam's moment (0.99, bias-corrected) without its first one, and a tenth of its size as damping."""
    chain, passes = residual
    schedule = MetaSchedule(inner="preconditioned", val_weight=0.0, restart_every=10)
    level, _ = outer_of(chain, passes, changed(), schedule)
    level.restart()
    gradients = [
        {n: torch.linspace(low, 2.0, p.numel(), dtype=FLOAT64).view_as(p) for n, p in level.params.items()}
        for low in (-1.0, 0.5)
    ]
    for step, wanted in enumerate(gradients):
        before = {n: p.detach() for n, p in level.params.items()}
        level.params = level.step(sum((p * wanted[n]).sum() for n, p in level.params.items()))
        for name, found in level.params.items():
            first, second = gradients[0][name], wanted[name]
            variance = first**2 if step == 0 else (0.99 * 0.01 * first**2 + 0.01 * second**2) / (1 - 0.99**2)
            size = variance.sqrt()
            moved = before[name] - level.rates[name] * second / (size + 0.1 * size.square().mean().sqrt())
            least = -math.inf if name.endswith("rounding_logits") else LEAST_LEARNED_FACTOR
            torch.testing.assert_close(found, moved.clamp(min=least), rtol=1e-9, atol=1e-12)


def test_the_blocks_own_parameters_stay_and_inner_steps_walk_until_the_restart(residual):
    chain, passes = residual
    before = {n: p.detach().clone() for n, p in chain.blocks[1].quantized_block.named_parameters()}
    level, _ = outer_of(chain, passes, changed(), MetaSchedule(inner="sgd", restart_every=5))
    assert any(not torch.equal(p, level.start[n]) for n, p in level.params.items())
    level.restart()
    assert all(torch.equal(p, level.start[n]) for n, p in level.params.items())
    for name, parameter in chain.blocks[1].quantized_block.named_parameters():
        assert torch.equal(parameter, before[name])


def test_only_what_the_method_learns_is_moved(residual):
    chain, passes = residual
    no_scales = replace(INNER, learn_weight_scale=False, learn_act_scale=False)
    level = BiLevel(chain.blocks[1], passes, no_scales, MetaSchedule(), RADIUS, torch.Generator())
    assert level.rates
    assert all(name.endswith("rounding_logits") for name in level.rates)
    level = BiLevel(chain.blocks[1], passes, INNER, MetaSchedule(), RADIUS, torch.Generator())
    kinds = {name.rpartition(".")[2] for name in level.rates}
    assert kinds == {"rounding_logits", "relative_scale"}


def test_without_a_validation_weight_nothing_is_validated_unless_it_is_measured(residual):
    chain, passes = residual
    schedule = MetaSchedule(val_weight=0.0, preserve_weight=0.0)
    _, outer = outer_of(chain, passes, changed(), schedule)
    assert math.isnan(float(outer.validation))
    assert math.isnan(outer.validation_before)
    assert float(outer.gradients[0].abs().sum()) == 0
    assert float(outer.gradients[2].abs().sum()) == 0
    _, measured = outer_of(chain, passes, changed(), schedule, measure=True)
    assert measured.validation_before > 0
    assert float(measured.validation) > 0


@pytest.mark.parametrize(
    ("two_sided", "distance", "loss"), [(False, 0.1, 0.2), (False, 0.5, 0.0), (True, 0.5, 0.2)]
)
def test_the_margin_keeps_away_from_the_identity(residual, two_sided, distance, loss):
    chain, passes = residual
    level = BiLevel(
        chain.blocks[1], passes, INNER, MetaSchedule(two_sided=two_sided), RADIUS, torch.Generator()
    )
    assert float(level.margin(torch.tensor(distance))) == pytest.approx(loss)


def test_the_regulariser_follows_the_walk(residual, monkeypatch):
    """Off in a single step, as in the first share of a block's own schedule; on at the end of a long walk."""
    chain, passes = residual
    asked = []
    original = module_under_test.rounding_regularizer
    monkeypatch.setattr(
        module_under_test,
        "rounding_regularizer",
        lambda soft, beta: asked.append(beta) or original(soft, beta),
    )
    outer_of(chain, passes, changed(), MetaSchedule(restart_every=1))
    assert asked == []
    level, _ = outer_of(chain, passes, changed(), MetaSchedule(restart_every=10))
    level.position = 9
    h = passes.prefixes(changed(), 1)
    with inner_mode(chain.blocks[1], 0.5, level.drops):
        level.training_loss(level.params, *h, level.block.float_block(*h[0]))
    assert len(asked) == 1
    assert 2.0 <= asked[0] < 5.0
