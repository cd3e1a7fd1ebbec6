"""The statistics that batch norms see and store, read from a captured network."""

import pytest
import torch
from moments import moment_distance
from networks import FAMILIES, SIZE, images, trained
from torch import nn

from metaaug_cli.errors import InputError
from metaaug_cli.graph.bn_statistics import _moments, batch_norm_probe
from metaaug_cli.graph.capture import capture, export_program
from metaaug_cli.layout import fast_layout


def norms(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def hooked_inputs(network, x):
    seen = []
    handles = [m.register_forward_hook(lambda _, i, o: seen.append(i[0])) for m in norms(network).values()]
    outputs = network(x)
    for handle in handles:
        handle.remove()
    return seen, outputs


@pytest.mark.parametrize("name", [n for n in FAMILIES if norms(FAMILIES[n]())])
def test_moments_are_those_that_forward_hooks_see(name):
    network = trained(FAMILIES[name]())
    probe, x = batch_norm_probe(network, SIZE), images(4)
    seen, outputs = hooked_inputs(network, x)
    observed = probe(x)
    torch.testing.assert_close(observed.outputs, outputs)
    assert len(observed.moments) == len(seen) == len(probe.layers)
    for moments, value in zip(observed.moments, seen, strict=True):
        rows = value.transpose(0, 1).flatten(1)
        torch.testing.assert_close(moments.mean, rows.mean(1))
        torch.testing.assert_close(moments.std, rows.std(1, unbiased=False), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (6, 3), (4, 3, 7)])
@pytest.mark.parametrize("turn", [False, True])
def test_the_moments_gradient_is_that_of_the_plain_formula(shape, turn):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = (fast_layout(x) if turn else x).requires_grad_()
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    found = _moments(x)
    axes = [0, *range(2, x.dim())]
    plain = x.mean(axes), x.square().mean(axes)
    gradients = [
        torch.autograd.grad((weights[0] * mean + weights[1] * second).sum(), x)[0]
        for mean, second in ((found.mean, found.second), plain)
    ]
    torch.testing.assert_close((found.mean, found.second), plain)
    torch.testing.assert_close(*gradients)
    assert gradients[0].stride() == x.stride()


def test_layers_carry_the_modules_names_and_stored_statistics():
    network = trained(FAMILIES["residual"]())
    probe = batch_norm_probe(network, SIZE)
    modules = norms(network)
    assert {layer.name for layer in probe.layers} == modules.keys()
    for layer in probe.layers:
        assert torch.equal(layer.mean, modules[layer.name].running_mean)
        assert torch.equal(layer.variance, modules[layer.name].running_var)


def test_an_exported_program_serves_like_the_module():
    network = trained(FAMILIES["residual"]())
    program = export_program(network, SIZE)
    own, from_program = (batch_norm_probe(n, SIZE)(images(3)) for n in (network, program))
    for a, b in zip(own.moments, from_program.moments, strict=True):
        torch.testing.assert_close(a.mean, b.mean)
        torch.testing.assert_close(a.second, b.second)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.ReLU()])
def test_logits_that_are_changed_after_the_last_layer_have_no_classifier(last):
    plain = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5), nn.Dropout())
    assert batch_norm_probe(trained(plain), SIZE).classifier_weight is not None
    probe = batch_norm_probe(trained(nn.Sequential(plain, last)), SIZE)
    assert probe.classifier_weight is None
    assert probe(images(2)).features is None


def test_distance_reaches_the_images():
    probe = batch_norm_probe(trained(FAMILIES["residual"]()), SIZE)
    x = images(4).requires_grad_()
    pairs = zip(probe(x).moments, probe.layers, strict=True)
    sum(moment_distance(m, layer) for m, layer in pairs).backward()
    assert torch.isfinite(x.grad).all()
    assert float(x.grad.abs().min(0).values.max()) > 0


def test_features_times_classifier_weight_are_the_logits():
    network = trained(FAMILIES["residual"]())
    probe = batch_norm_probe(network, SIZE)
    observed = probe(images(3))
    torch.testing.assert_close(
        observed.features @ probe.classifier_weight.T + network.fc.bias, observed.outputs
    )


def test_folded_batch_norms_are_named_as_the_cause():
    folded = capture(trained(FAMILIES["residual"]()), SIZE)
    with pytest.raises(InputError, match="folded") as error:
        batch_norm_probe(folded, SIZE)
    assert "--images DIR" in error.value.hint


def test_other_norms_are_named_as_the_cause():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 5)).eval()
    with pytest.raises(InputError, match="group norms"):
        batch_norm_probe(network, SIZE)


def test_batch_norms_without_running_statistics_are_named_as_the_cause():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(InputError, match="track_running_stats"):
        batch_norm_probe(network, SIZE)
