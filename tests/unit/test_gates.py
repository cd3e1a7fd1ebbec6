"""Limits: what passes, what is missed, and what is refused before anything runs."""

import pytest
import torch

from metaaug_cli.errors import GateError, UsageError
from metaaug_cli.evaluation import Predictions, score
from metaaug_cli.gates import accuracy_gates, check_limits, require


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
