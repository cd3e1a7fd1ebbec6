"""Parity passes on a faithful file, and names the layer where a file was tampered with."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import InputError
from metaaug_cli.verification.codes import Comparison, Worst, compare_codes
from metaaug_cli.verification.parity import LayerParity, Parity, check_parity


@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A4", "W2A2"])
def test_a_faithful_file_has_no_differing_code(exported, networks, bits):
    graph, path = exported(bits)
    batches = networks.images(40).split(24)
    parity = check_parity(path, IntegerSimulation(graph), batches, reference=True, chunk=16)
    assert parity.passed
    assert parity.images == 40
    assert parity.top1_agreement == parity.reference_top1_agreement == 1.0
    assert parity.max_logit_difference <= 1e-6
    assert [layer.name for layer in parity.layers][:3] == ["input", "act1", "act2"]
    for layer in parity.layers:
        assert layer.free.mismatches == layer.forced.mismatches == layer.reference.mismatches == 0
    assert parity.layers[0].codes == 40 * 3 * 16 * 16
    assert parity.verdict() == "all 8 code tensors agree"


def test_reference_is_optional(exported, networks):
    graph, path = exported("W2A2")
    steps = []
    parity = check_parity(
        path, graph, [networks.images(20)], chunk=8, progress=lambda done, _: steps.append(done)
    )
    assert parity.reference_top1_agreement is None
    assert all(layer.reference is None for layer in parity.layers)
    assert parity.passed
    assert steps == [8, 16, 20]


def test_a_file_that_fixes_its_batch_gets_as_many_images(exported, networks, tmp_path):
    graph, path = exported("W4A4")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, tmp_path / "fixed.onnx")
    batches = networks.images(20).split(12)
    parity = check_parity(tmp_path / "fixed.onnx", graph, batches, reference=True)
    assert parity.passed
    assert parity.images == 20
    assert parity.layers[0].codes == 20 * 3 * 16 * 16


@pytest.fixture
def tampered(exported, tmp_path):
    """A file whose conv2 has one weight code more by 1 than the simulated network."""
    graph, path = exported("W4A4")
    model = onnx.load(path)
    codes = next(i for i in model.graph.initializer if i.name == "conv2.codes")
    values = numpy_helper.to_array(codes).copy()
    values[0, 0, 1, 1] += 1
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))
    changed = tmp_path / "tampered.onnx"
    onnx.save(model, changed)
    return graph, changed


def test_the_first_layer_out_of_tolerance_is_named_with_its_worst_case(tampered, networks):
    graph, path = tampered
    parity = check_parity(path, graph, [networks.images(16)], reference=True)
    assert not parity.passed
    assert parity.gate_a  # the file is run as it is written
    assert not parity.gate_b
    layer = parity.first_out_of_tolerance
    assert layer.name == "branch"
    worst = layer.forced.worst
    assert len(worst.index) == 4
    assert worst.index[1] == 0  # the channel that was changed
    assert abs(worst.ours - worst.runtime) == layer.forced.max_steps >= 1
    assert abs(worst.value - worst.ours) <= 0.5
    assert "branch" in parity.verdict()
    assert f"ONNX Runtime {worst.runtime}" in parity.verdict()


def test_teacher_forcing_blames_one_layer_only(tampered, networks):
    graph, path = tampered
    layers = {layer.name: layer for layer in check_parity(path, graph, [networks.images(16)]).layers}
    assert [name for name, layer in layers.items() if layer.forced.mismatches] == ["branch"]
    assert {"branch", "act3"} <= {name for name, layer in layers.items() if layer.free.mismatches}


def test_float_islands_are_within_tolerance(exported, networks):
    for pattern in networks.FLOAT_PATTERNS:
        graph, path = exported(pattern)
        parity = check_parity(path, graph, [networks.images(16)], reference=True)
        assert parity.passed, (pattern.__name__, parity.verdict())
        assert not parity.all_integer


def test_another_networks_file_is_refused(exported, networks):
    graph, _ = exported(networks.Concat)
    with pytest.raises(InputError, match=r"no codes of quantizer|has no quantizer"):
        check_parity(exported("W4A4")[1], graph, [networks.images(2)])


def test_a_file_that_is_not_there_is_a_clear_error(exported, networks, tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        check_parity(str(tmp_path / "no.onnx"), exported("W4A4")[0], [networks.images(2)])


def test_images_of_another_size_are_a_clear_error(exported):
    graph, path = exported("W4A4")
    for shape in ((2, 3, 8, 8), (2, 1, 16, 16)):
        with pytest.raises(InputError, match="for a file that reads"):
            check_parity(path, graph, [torch.zeros(shape)])


def test_no_images_is_an_error(exported):
    graph, path = exported("W4A4")
    with pytest.raises(InputError, match="no images"):
        check_parity(path, graph, [])


def test_comparisons_count_and_keep_the_worst():
    ours, runtime = np.uint8([[0, 5], [9, 3]]), np.uint8([[0, 6], [2, 3]])
    found = compare_codes(ours, runtime, torch.tensor([[0.0, 5.4], [9.1, 3.0]]))
    assert (found.mismatches, found.max_steps) == (2, 7)
    assert found.worst == Worst((1, 0), 9, 2, pytest.approx(9.1))
    later = Comparison(1, 7, Worst((0, 0), 1, 8)).shifted(10)
    assert later.worst.index == (10, 0)
    assert found.plus(later) == Comparison(3, 7, found.worst)
    assert Comparison().plus(later) == later
    with pytest.raises(InputError, match="shape"):
        compare_codes(ours, runtime[:1])


def make_parity(**changes):
    layer = {"name": "a", "codes": 100_000, "free": Comparison(), "forced": Comparison(), **changes}
    return Parity(10, (LayerParity(**layer),), 0.0, 1.0, 1.0, None if "reference" not in changes else 1.0)


@pytest.mark.parametrize(
    ("codes", "mismatches", "steps", "passes"),
    [
        (100_000, 20, 1, True),
        (100_000, 21, 1, False),
        (100_000, 1, 2, False),
        (10, 3, 1, True),
        (10, 4, 1, False),
    ],
)
def test_tolerance_of_gate_b(codes, mismatches, steps, passes):
    parity = make_parity(codes=codes, forced=Comparison(mismatches, steps, Worst((0,), 0, steps)))
    assert parity.gate_b is passes
    assert (parity.first_out_of_tolerance is None) is passes


@pytest.mark.parametrize(("exact", "passes"), [(True, False), (False, True)])
def test_gate_a_is_strict_except_behind_float_operators(exact, passes):
    parity = make_parity(reference=Comparison(1, 1, Worst((0,), 0, 1)), exact=exact)
    assert parity.gate_a is passes
    assert parity.gate_b
    assert parity.to_dict()["gate_a"] is passes


def test_low_agreement_alone_fails():
    parity = Parity(1000, make_parity().layers, 0.1, 1.0, 0.99)
    assert not parity.gate_b
    assert "99.00 %" in parity.verdict()


def test_disturbed_integer_codes_cannot_be_compared():
    assert not Parity(10, make_parity().layers, 0.0, 1.0, 1.0, disturbance=0.5).passed
    behind_float = make_parity(exact=False).layers
    assert Parity(10, behind_float, 0.0, 1.0, 1.0, disturbance=0.5).passed
