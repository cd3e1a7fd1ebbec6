"""Images made from batch norms: they come closer to the stored statistics, each idea does what it says."""

import copy
import functools
import math

import pytest
import torch
from moments import moment_distance, set_moments
from networks import SIZE, conv_bn, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.calibration.data import load_calibration_set, save_calibration_set
from metaaug_cli.errors import GraphError, InputError, UsageError
from metaaug_cli.graph.bn_statistics import batch_norm_probe
from metaaug_cli.graph.capture import export_program
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.synthesis.dgh import (
    STRETCH_WEIGHT,
    SynthesisHistory,
    SynthesisSettings,
    _joined,
    _Loss,
    _Synthesis,
    estimate_seconds,
    synthesize_calibration_set,
)

PREPROCESSING = Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.25,) * 3)
SMALL = {"num": 5, "batch_size": 2, "iterations": 7, "rate": 0.3}


class Net(nn.Module):
    """Two batch norms are enough."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = conv_bn(3, 6), conv_bn(6, 6, stride=2), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).mean([2, 3]))


@functools.cache
def traced():
    """Traced once for all tests, as a ``.pt2`` file would be."""
    network = trained(Net()).requires_grad_(False)
    return network, export_program(network, SIZE)


def model(network=None):
    return LoadedModel(network or traced()[1], "net", PREPROCESSING, "random", "0" * 64)


def make(*, of=None, **settings):
    return synthesize_calibration_set(of or model(), SynthesisSettings(**{**SMALL, **settings}))


def distance(of, images):
    probe = batch_norm_probe(of.module, SIZE)
    pairs = zip(set_moments(probe, images), probe.layers, strict=True)
    return sum(float(moment_distance(m, layer)) for m, layer in pairs) / len(probe.layers)


@pytest.mark.parametrize(("whole_set", "preprocessing"), [(True, True), (False, True), (True, False)])
def test_images_come_closer_to_the_stored_statistics(whole_set, preprocessing):
    options = {"num": 8, "batch_size": 4, "whole_set": whole_set, "preprocessing": preprocessing}
    history, of = SynthesisHistory(), model()
    settings = SynthesisSettings(**options, iterations=30, rate=0.3)
    learned = synthesize_calibration_set(of, settings, history=history)
    assert len(history.losses) == 30
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert distance(of, learned.images) < 0.8 * distance(
        of, make(of=of, **options, iterations=1, rate=1e-6).images
    )


def test_result_is_an_ordinary_calibration_set_of_valid_pixels(tmp_path):
    made = make()
    assert made.images.shape == (5, *SIZE)
    pixels = PREPROCESSING.denormalise(made.images).mul(255)
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
    assert pixels.min() > -1e-3
    assert pixels.max() < 255 + 1e-3
    save_calibration_set(made, tmp_path / "made.safetensors")
    read = load_calibration_set(tmp_path / "made.safetensors", preprocessing=PREPROCESSING)
    assert torch.equal(read.images, made.images)
    assert read.sha256 == made.sha256
    assert "data-free" in read.origin


def test_the_seed_decides():
    assert make(seed=3).sha256 == make(seed=3).sha256 != make(seed=4).sha256


@pytest.mark.parametrize("other", [{"whole_set": False}, {"stretch": "regularised"}, {"stretch": "off"}])
def test_every_idea_can_be_switched(other):
    assert not torch.equal(pixels_after_steps(), pixels_after_steps(**other))
    assert torch.equal(pixels_after_steps(**other), pixels_after_steps(**other))


def test_images_without_preprocessing_are_stored_without_a_margin():
    assert pixels_after_steps().shape == (5, 3, 10, 10)
    assert pixels_after_steps(preprocessing=False).shape == (5, 3, 8, 8)


def pixels_after_steps(**settings):
    synthesis = _Synthesis(model(), SynthesisSettings(**{**SMALL, **settings}), torch.device("cpu"))
    synthesis.observe_all()
    for _ in range(7):
        synthesis.take_step()
    return torch.cat([b.detach() for b in synthesis.batches])


def test_whole_set_statistics_are_those_of_all_batches():
    synthesis = _Synthesis(model(), SynthesisSettings(**SMALL), torch.device("cpu"))
    synthesis.observe_all()
    views = [synthesis.views.drawn(b, torch.Generator().manual_seed(0)).detach() for b in synthesis.batches]
    synthesis.seen = torch.stack(
        [
            torch.stack([torch.cat([m.mean for m in ms]), torch.cat([m.second for m in ms])])
            for ms in (set_moments(synthesis.probe, v) for v in views)
        ]
    )
    joined = set_moments(synthesis.probe, torch.cat(views))
    total = (synthesis.seen * synthesis.shares).sum(0)
    torch.testing.assert_close(total[0], torch.cat([m.mean for m in joined]))
    torch.testing.assert_close(total[1], torch.cat([m.second for m in joined]))
    wanted = sum(moment_distance(m, n) for m, n in zip(joined, synthesis.probe.layers, strict=True))
    torch.testing.assert_close(synthesis.loss.match(total), wanted / len(joined))


def test_no_layer_counts_for_the_size_of_its_values():
    of, (network, _) = model(), traced()
    larger = copy.deepcopy(network)
    conv, norm = larger.first[0], larger.first[1]
    with torch.no_grad():  # the same function: a hundredfold convolution before a batch norm that expects it
        for tensor in (conv.weight, norm.running_mean):
            tensor.mul_(100)
        norm.running_var.mul_(100**2)
        norm.eps *= 100**2
    x = torch.randn(4, *SIZE)
    torch.testing.assert_close(larger(x), network(x))
    probes = [batch_norm_probe(n, SIZE) for n in (of.module, larger)]
    losses = [_Loss(probe, "off").match(_joined(probe(x))) for probe in probes]
    torch.testing.assert_close(*losses)


def test_the_direction_of_a_step_does_not_depend_on_how_the_set_is_split(monkeypatch):
    monkeypatch.setitem(STRETCH_WEIGHT, "plain", 0.1)  # both terms count
    pixels, gradients = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(3)), []
    for batch_size in (4, 2):
        options = SMALL | {"num": 4, "batch_size": batch_size, "preprocessing": False}
        synthesis = _Synthesis(model(), SynthesisSettings(**options), torch.device("cpu"))
        for batch, part in zip(synthesis.batches, pixels.split(batch_size), strict=True):
            batch.data.copy_(part)
        synthesis.observe_all()
        synthesis.take_step()
        gradients.append(synthesis.batches[0].grad[:2])
    torch.testing.assert_close(*gradients)


def test_a_step_changes_one_batch_only():
    synthesis = _Synthesis(model(), SynthesisSettings(**SMALL), torch.device("cpu"))
    synthesis.observe_all()
    before = [b.detach().clone() for b in synthesis.batches]
    synthesis.take_step()
    synthesis.take_step()
    changed = [not torch.equal(a, b) for a, b in zip(before, synthesis.batches, strict=True)]
    assert changed == [True, True, False]


def test_plain_stretching_rewards_the_range_of_the_logits():
    probe = batch_norm_probe(model().module, SIZE)
    observed = probe(torch.randn(3, *SIZE))
    spread = observed.outputs.amax(1) - observed.outputs.amin(1)
    torch.testing.assert_close(
        _Loss(probe, "plain").stretch(observed), -STRETCH_WEIGHT["plain"] * spread.mean()
    )


def test_regularised_stretching_draws_the_logits_to_half_of_what_the_norms_allow():
    network = traced()[0]
    probe = batch_norm_probe(model().module, SIZE)
    observed = probe(torch.randn(3, *SIZE))
    terms = []
    for logits, feature in zip(observed.outputs, observed.features, strict=True):
        for index in (int(logits.argmax()), int(logits.argmin())):
            bound = feature.norm() * network.fc.weight[index].norm() / 2
            terms.append((logits[index].abs() - bound).abs())
    wanted = STRETCH_WEIGHT["regularised"] * torch.stack(terms).view(3, 2).sum(1).mean()
    torch.testing.assert_close(_Loss(probe, "regularised").stretch(observed), wanted)


def test_a_plateau_halves_the_rate_and_clears_the_optimizer():
    synthesis = _Synthesis(model(), SynthesisSettings(**{**SMALL, "num": 2}), torch.device("cpu"))
    synthesis.observe_all()
    synthesis.take_step()
    synthesis.last_loss = synthesis.plateau.best = 0.0
    assert synthesis.optimizer.state
    for _ in range(12):
        synthesis.epoch_loss.fill_(5.0)
        synthesis._end_pass()
    assert synthesis.optimizer.param_groups[0]["lr"] == 0.15
    assert not synthesis.optimizer.state


def test_the_loss_is_not_shown_before_it_is_known():
    texts = []
    synthesize_calibration_set(
        model(), SynthesisSettings(**SMALL), tick=lambda done, total, text: texts.append(text)
    )
    assert texts[:2] == ["", ""]
    assert all(text.startswith("BN loss ") and "inf" not in text for text in texts[2:])


def test_a_loss_that_is_no_number_ends_the_run():
    synthesis = _Synthesis(model(), SynthesisSettings(**SMALL), torch.device("cpu"))
    synthesis.epoch_loss.fill_(math.nan)
    with pytest.raises(GraphError, match="NaN"):
        synthesis._end_pass()


def test_batch_norms_as_they_start_get_a_warning(caplog):
    network = Net().eval()
    make(of=model(network=network), iterations=1)
    assert "pass trained weights" in caplog.text
    caplog.clear()
    make(iterations=1)
    assert "pass trained weights" not in caplog.text


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 10, 19])
def test_a_killed_run_resumes_to_the_same_images(tmp_path, monkeypatch, at):
    monkeypatch.setattr("metaaug_cli.synthesis.state.StateFile.save_if_due", _save_always)
    state = tmp_path / "made.partial"

    def kill(done, total, text):
        if done == at:
            raise KilledError

    options = {"state_path": state}
    settings = SynthesisSettings(**SMALL)
    with pytest.raises(KilledError):
        synthesize_calibration_set(model(), settings, **options, tick=kill)
    with pytest.raises(UsageError, match="unfinished"):
        synthesize_calibration_set(model(), settings, **options)
    done = []
    resumed = synthesize_calibration_set(
        model(), settings, **options, resume=True, tick=lambda i, n, text: done.append(i)
    )
    assert done[0] == at + 1
    assert resumed.sha256 == make().sha256


def _save_always(self, tensors, scalars):
    self.save(tensors, scalars)


def test_a_run_killed_at_its_first_step_can_be_resumed(tmp_path):
    state, settings = tmp_path / "new" / "made.partial", SynthesisSettings(**SMALL)

    def kill(done, total, text):
        raise KilledError

    with pytest.raises(KilledError):
        synthesize_calibration_set(model(), settings, state_path=state, tick=kill)
    resumed = synthesize_calibration_set(model(), settings, state_path=state, resume=True)
    assert resumed.sha256 == make().sha256


def test_a_place_for_the_state_that_cannot_be_written_shows_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"):
        synthesize_calibration_set(
            model(),
            SynthesisSettings(**SMALL),
            state_path=tmp_path / "file" / "made.partial",
            tick=lambda done, total, text: pytest.fail("a step was taken"),
        )


def test_a_state_of_other_settings_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("metaaug_cli.synthesis.state.StateFile.save_if_due", _save_always)
    state = tmp_path / "made.partial"
    synthesize_calibration_set(model(), SynthesisSettings(**SMALL), state_path=state)
    other = SynthesisSettings(**SMALL | {"batch_size": 3}, seed=1, stretch="off", whole_set=False)
    with pytest.raises(UsageError, match=r"another --batch, --no-whole-set, --seed, --stretch$"):
        synthesize_calibration_set(model(), other, state_path=state, resume=True)
    with pytest.raises(InputError, match=r"no .* to resume"):
        synthesize_calibration_set(
            model(), SynthesisSettings(**SMALL), state_path=tmp_path / "none", resume=True
        )
    state.write_bytes(b"rubbish")
    with pytest.raises(InputError, match="not a readable state"):
        synthesize_calibration_set(model(), SynthesisSettings(**SMALL), state_path=state, resume=True)


def test_a_network_without_batch_norms_is_refused_with_a_way_out():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    with pytest.raises(InputError, match="no batch norms") as error:
        make(of=model(network=network))
    assert "--images" in error.value.hint


class MapNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def test_stretching_without_logits_is_refused():
    of = model(network=trained(MapNet()))
    with pytest.raises(UsageError, match="row of logits"):
        make(of=of)
    with pytest.raises(UsageError, match="linear layer"):
        make(of=of, stretch="regularised")
    assert len(make(of=of, stretch="off").images) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"num": 0},
        {"iterations": 0},
        {"batch_size": 0},
        {"rate": math.nan},
        {"stretch": "much"},
        {"start": "white"},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SynthesisSettings(**wrong)


def test_the_estimate_grows_with_the_work():
    of = model()
    few = estimate_seconds(of, SynthesisSettings(num=2, batch_size=2, iterations=10))
    many = estimate_seconds(of, SynthesisSettings(num=200, batch_size=2, iterations=1000))
    assert 0 < few < many


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_learns_in_mixed_precision():
    history, of = SynthesisHistory(), model()
    settings = SynthesisSettings(num=8, batch_size=4, iterations=60, rate=0.3)
    made = synthesize_calibration_set(of, settings, device=torch.device("cuda"), history=history)
    assert history.losses[-1] < 0.6 * history.losses[0]
    assert made.images.device.type == "cpu"
