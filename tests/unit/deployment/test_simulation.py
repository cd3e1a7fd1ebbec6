"""The integer simulation gives ONNX Runtime's codes, where float arithmetic lands on the other side."""

import numpy as np
import pytest
import torch

from metaaug_cli.deployment.integer_ops import Codes, Pending, as_tensor
from metaaug_cli.deployment.simulation import IntegerSimulation, run_integers
from metaaug_cli.verification.codes import RuntimeCodes, simulate


def compare(graph, path, images):
    runtime = RuntimeCodes(path)
    logits, codes = runtime.run(images.numpy())
    simulated, found = simulate(graph, images, codes, force=False)
    return logits, simulated, {name: result.mismatches for name, result in found.items()}


@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A4", "W2A2"])
def test_no_code_differs_from_the_runtime(exported, networks, bits):
    logits, simulated, mismatches = compare(*exported(bits), networks.images(32))
    assert set(mismatches.values()) == {0}
    assert len(mismatches) == 8
    np.testing.assert_allclose(simulated, logits, rtol=1e-6)


def test_no_code_differs_in_any_pattern(exported, networks):
    for pattern in networks.INTEGER_PATTERNS:
        _, _, mismatches = compare(*exported(pattern), networks.images(32))
        assert set(mismatches.values()) == {0}, pattern.__name__


def border_graph(networks):
    """A 1x1 convolution whose sums lie on the border of two codes: acc * 0.1 * 0.3 / 0.06 = acc / 2."""
    net = networks.Middle()
    net.act.scale.fill_(0.06)
    net.stem.scale.fill_(0.3)
    net.input.scale.fill_(0.1)
    net.stem.bias_scale.copy_(net.input.scale * net.stem.scale)
    return networks.as_graph(net)


def test_borders_of_codes_go_the_way_of_the_integer_kernel(networks, manifest, tmp_path):
    from metaaug_cli.deployment.export import export_onnx

    graph, path = border_graph(networks), tmp_path / "m.onnx"
    export_onnx(graph, input_size=networks.SIZE, path=path, manifest=manifest)
    images = networks.images(8) * 0.3
    _, _, mismatches = compare(graph, path, images)
    assert mismatches["act"] == 0
    seen = {}

    def note(name, codes, steps):
        seen[name] = steps
        return codes

    run_integers(graph, images, note)
    inside = seen["act"][(seen["act"] > 0) & (seen["act"] < 15)]
    borders = (inside - inside.floor() - 0.5).abs() < 1e-5
    assert borders.float().mean() > 0.1  # the case is real: float arithmetic may put these on either side


def test_simulation_is_a_module_of_the_same_function(exported, networks):
    graph, _ = exported("W8A8")
    images = networks.images(4)
    simulation = IntegerSimulation(graph)
    with torch.no_grad():
        eager = graph(images)
    assert simulation(images).shape == eager.shape
    assert (simulation(images) - eager).abs().max() < 0.1 * eager.std()


def test_hook_sees_and_replaces_codes(exported, networks):
    graph, _ = exported("W2A2")
    names = []

    def zero_last(name, codes, steps):
        names.append(name)
        assert codes.shape == steps.shape
        return torch.zeros_like(codes) if name == "pooled" else codes

    logits = run_integers(graph, networks.images(3), zero_last)
    assert names == ["input", "act1", "act2", "branch", "act3", "act4", "act5", "pooled"]
    assert torch.equal(logits[0], logits[1])  # only the head's bias is left


def test_wide_sums_use_float64():
    """127 * 255 * 1024 is above 2**24, where float32 drops the last bit."""
    from metaaug_cli.deployment.integer_ops import HANDLERS

    linear = HANDLERS[torch.ops.aten.linear.default]
    weight = HANDLERS[torch.ops.metaaug.dequantize_weight.default]
    codes = Codes(torch.full((1, 1024), 255.0), torch.tensor(1.0), 0)
    rows = torch.full((1, 1024), 127, dtype=torch.int8)
    rows[0, 0] = 126
    pending = linear(codes, weight(rows, torch.ones(1)))
    assert isinstance(pending, Pending)
    exact = 255 * (127 * 1023 + 126)
    assert float(as_tensor(pending)) == float(np.float32(exact))
    steps, rounded = pending.requantize(torch.tensor(float(2**18)), 0)
    assert float(rounded) == round(exact / 2**18)
    assert float(steps) == pytest.approx(exact / 2**18, rel=1e-6)
