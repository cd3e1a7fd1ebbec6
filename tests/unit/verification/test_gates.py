"""Limits: what passes, what is missed, and what is refused before anything runs."""

import pytest
import torch

from metaaug_cli.errors import GateError, UsageError
from metaaug_cli.verification.evaluation import Predictions, score
from metaaug_cli.verification.gates import accuracy_gates, check_limits, parity_gates, require
from metaaug_cli.verification.parity import Comparison, LayerParity, Parity, Worst


def evaluation(*, wrong=0, labels=True, judged="onnxruntime"):
    """100 images, on which float is right and the judged predictor errs ``wrong`` times."""
    target = torch.arange(100) % 4
    answers = target.clone()
    answers[:wrong] = (answers[:wrong] + 1) % 4
    eye = torch.eye(4)
    return score(Predictions({"float": eye[target], judged: eye[answers]}, target if labels else None))


@pytest.mark.parametrize(("wrong", "passed"), [(0, True), (1, True), (2, False)])
def test_limits_hold_up_to_and_including_their_value(wrong, passed):
    gates = accuracy_gates(evaluation(wrong=wrong), max_drop=1.0, min_agreement=0.99)
    assert [gate.name for gate in gates] == ["max-drop", "min-agreement"]
    assert [gate.passed for gate in gates] == [passed, passed]
    assert gates[0].measured == wrong
    assert gates[1].measured == (100 - wrong) / 100


def test_the_exported_file_is_judged_before_the_simulation():
    target = torch.arange(8) % 4
    eye = torch.eye(4)
    logits = {"float": eye[target], "simulated": eye[target], "onnxruntime": eye[(target + 1) % 4]}
    (gate,) = accuracy_gates(score(Predictions(logits, target)), max_drop=5)
    assert not gate.passed
    assert gate.measured == 100
    assert gate.text.startswith("onnxruntime loses 100.00")


def test_the_simulation_is_judged_when_there_is_no_file():
    (gate,) = accuracy_gates(evaluation(wrong=3, judged="simulated"), min_agreement=0.98)
    assert "simulated" in gate.text
    assert not gate.passed


def test_a_drop_without_labels_is_refused():
    with pytest.raises(UsageError, match="--max-drop needs labels"):
        accuracy_gates(evaluation(labels=False), max_drop=1)


def test_a_comparison_without_the_float_network_is_refused():
    logits = torch.eye(4)
    alone = score(Predictions({"onnxruntime": logits}, torch.arange(4)))
    with pytest.raises(UsageError, match="float network") as caught:
        accuracy_gates(alone, min_agreement=0.5)
    assert "--model" in caught.value.hint
    assert accuracy_gates(alone) == []


@pytest.mark.parametrize(
    ("limits", "hint"),
    [
        ({"max_drop": -1.0, "min_agreement": None}, "--max-drop 1.0"),
        ({"max_drop": None, "min_agreement": 99.0}, "--min-agreement 0.99 is 99 %"),
    ],
)
def test_slips_are_refused_with_what_was_meant(limits, hint):
    with pytest.raises(UsageError) as caught:
        check_limits(**limits)
    assert hint in caught.value.hint


def test_require_names_every_missed_gate():
    require(accuracy_gates(evaluation(wrong=0), max_drop=0, min_agreement=1))
    with pytest.raises(GateError, match="2 of 2 gates missed: max-drop, min-agreement") as caught:
        require(accuracy_gates(evaluation(wrong=1), max_drop=0, min_agreement=1))
    assert caught.value.exit_code == 1


def test_a_miss_never_reads_like_a_pass():
    eye = torch.eye(2)
    answers = torch.zeros(40000, dtype=torch.int64)
    answers[0] = 1
    logits = {"float": eye[torch.zeros(40000, dtype=torch.int64)], "onnxruntime": eye[answers]}
    (gate,) = accuracy_gates(score(Predictions(logits, None)), min_agreement=1)
    assert not gate.passed
    assert "on 100.00 %" not in gate.text
    assert "99.9975 %" in gate.text


EXACT = Comparison()


def layer(name, *, forced=EXACT, reference=EXACT, exact=True):
    return LayerParity(name, codes=10_000, exact=exact, free=EXACT, forced=forced, reference=reference)


def differing(mismatches, steps=1):
    return Comparison(mismatches, steps, Worst((7, 0, 1), ours=3, runtime=3 + steps, value=3.4999))


def parity(*layers, top1=1.0, reference_top1=1.0, disturbance=0.0):
    return Parity(100, layers, 0.01, 1.0, top1, reference_top1, disturbance)


def three_way(*, simulated_wrong=0):
    """100 images on which simulation and runtime differ in ``simulated_wrong`` answers."""
    target = torch.arange(100) % 4
    answers = target.clone()
    answers[:simulated_wrong] = (answers[:simulated_wrong] + 1) % 4
    eye = torch.eye(4)
    logits = {"float": eye[target], "simulated": eye[answers], "onnxruntime": eye[target]}
    return score(Predictions(logits, target))


def verdicts(gates):
    return {gate.name.removeprefix("parity-"): gate.passed for gate in gates}


def test_parity_that_holds():
    gates = parity_gates(parity(layer("stem"), layer("head")), three_way())
    assert verdicts(gates) == {"reference": True, "simulation": True, "accuracy": True}
    assert "exactly the codes" in gates[0].text


def test_one_code_off_the_integer_reference_fails_and_names_the_first_layer():
    found = parity(
        layer("stem"), layer("conv2", reference=differing(1)), layer("head", reference=differing(900))
    )
    reference, simulation, _ = parity_gates(found, three_way())
    assert not reference.passed
    assert simulation.passed
    assert "conv2 is the first layer to differ" in reference.text
    assert "1 of 10000 codes" in reference.text
    assert "image 7" in reference.text


@pytest.mark.parametrize(
    ("forced", "passed"),
    [(differing(3), True), (differing(4), False), (differing(1, steps=2), False)],
)
def test_the_simulation_may_differ_in_few_codes_by_one_level(forced, passed):
    _, simulation, _ = parity_gates(parity(layer("stem"), layer("conv2", forced=forced)), three_way())
    assert simulation.passed is passed
    assert ("conv2 is the first layer to leave tolerance" in simulation.text) is not passed


def test_the_simulation_must_give_the_same_answers():
    _, simulation, _ = parity_gates(parity(layer("stem"), top1=0.99), three_way())
    assert not simulation.passed
    assert simulation.measured == 0.99
    assert "99.00 %" in simulation.text


def test_answers_that_differ_with_equal_codes_fail_the_reference():
    reference, *_ = parity_gates(parity(layer("stem"), reference_top1=0.98), three_way())
    assert not reference.passed
    assert "98.00 %" in reference.text


def test_codes_that_could_not_be_read_unchanged_fail():
    reference, *_ = parity_gates(parity(layer("stem"), disturbance=0.5), three_way())
    assert not reference.passed


def test_behind_float_operators_the_text_claims_less():
    reference, *_ = parity_gates(parity(layer("stem", exact=False, reference=differing(1))), three_way())
    assert reference.passed
    assert "exactly" not in reference.text


@pytest.mark.parametrize(("wrong", "passed"), [(0, True), (1, True), (2, False)])
def test_the_accuracies_may_differ_by_a_tenth_of_a_point_or_one_image(wrong, passed):
    *_, accuracy = parity_gates(parity(layer("stem")), three_way(simulated_wrong=wrong))
    assert accuracy.passed is passed
    assert accuracy.measured == wrong


def test_without_labels_there_is_no_accuracy_gate():
    eye = torch.eye(4)
    logits = {"float": eye, "simulated": eye, "onnxruntime": eye}
    assert len(parity_gates(parity(layer("stem")), score(Predictions(logits, None)))) == 2
