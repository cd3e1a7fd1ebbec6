"""Scores against hand numbers and independent formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaaug_cli.errors import InputError, MetaAugError
from metaaug_cli.verification.evaluation import Predictions, paired_drop, predict, score, torch_predictor


def one_hot(classes, count, *, margin=10.0):
    """Logits whose argmax are the given classes."""
    return margin * torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def batches_of(images, labels, size):
    for start in range(0, len(images), size):
        yield images[start : start + size], None if labels is None else labels[start : start + size]


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_hand_numbers():
    labels = torch.tensor([0, 1, 2, 3])
    logits = {"float": one_hot([0, 1, 2, 0], 6), "simulated": one_hot([0, 1, 1, 3], 6)}
    evaluation = score(Predictions(logits, labels))
    float_score, simulated = evaluation.scores["float"], evaluation.scores["simulated"]
    assert float_score.top1 == 0.75
    assert simulated.top1 == 0.75
    assert float_score.drop is None
    assert simulated.drop == 0.0
    # differences per image: 0, 0, 1, -1; their standard deviation is sqrt(2/3), over sqrt(4) images
    assert simulated.drop_stderr == pytest.approx(100 * math.sqrt(2 / 3) / 2)
    assert simulated.agreement == {"float": 0.5}
    assert simulated.max_logit_difference == {"float": 10.0}
    assert (evaluation.images, evaluation.classes, evaluation.labelled) == (4, 6, True)


def test_nll_and_calibration_error_match_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 7, generator=generator)
    labels = torch.randint(7, (500,), generator=generator)
    result = score(Predictions({"float": logits}, labels)).scores["float"]

    probabilities = softmax(logits.double().numpy())
    rows = np.arange(500)
    assert result.nll == pytest.approx(-np.log(probabilities[rows, labels]).mean(), rel=1e-6)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    expected = sum(
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)
    )
    assert result.ece == pytest.approx(expected, abs=1e-5)
    order = probabilities.argsort(1)[:, ::-1]
    assert result.top1 == pytest.approx((order[:, 0] == labels.numpy()).mean())
    assert result.top5 == pytest.approx((order[:, :5] == labels.numpy()[:, None]).any(1).mean())


def test_logits_between_0_and_1_are_not_taken_for_probabilities():
    labels = torch.zeros(8, dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    confidence = math.e / (math.e + 1)
    assert score(Predictions({"float": logits}, labels)).scores["float"].ece == pytest.approx(
        1 - confidence, abs=1e-6
    )


def test_without_labels_only_agreement_is_known():
    logits = {"float": one_hot([0, 1, 2], 3), "onnxruntime": one_hot([0, 1, 1], 3)}
    result = score(Predictions(logits, None)).scores["onnxruntime"]
    assert (result.top1, result.top5, result.nll, result.ece, result.drop) == (None,) * 5
    assert result.agreement["float"] == pytest.approx(2 / 3)


def test_top5_needs_more_than_five_classes():
    labels = torch.tensor([0, 1])
    assert score(Predictions({"float": one_hot([0, 1], 5)}, labels)).scores["float"].top5 is None
    assert score(Predictions({"float": one_hot([0, 1], 6)}, labels)).scores["float"].top5 == 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=50, deadline=None)
def test_paired_drop_is_the_difference_of_accuracies(pairs):
    candidate, reference = (torch.tensor(column) for column in zip(*pairs, strict=True))
    drop, stderr = paired_drop(candidate, reference)
    expected = 100 * (reference.double().mean() - candidate.double().mean()).item()
    assert drop == pytest.approx(expected, abs=1e-9)
    difference = reference.double().numpy() - candidate.double().numpy()
    assert stderr == pytest.approx(100 * difference.std(ddof=1) / math.sqrt(len(pairs)))
    assert (stderr == 0) == (len(set(difference)) == 1)


def test_a_drop_at_the_limit_is_not_above_it():
    reference = torch.ones(5000, dtype=torch.bool)
    for lost in range(1, 200):
        candidate = reference.clone()
        candidate[:lost] = False
        assert paired_drop(candidate, reference)[0] == float(f"{lost * 0.02:.2f}")


def test_one_image_has_no_standard_error():
    assert paired_drop(torch.tensor([False]), torch.tensor([True])) == (100.0, None)


def test_predict_joins_batches_and_reports_progress():
    images = torch.randn(10, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(10) % 3
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    seen = []
    predictions = predict(
        {"float": torch_predictor(module)},
        batches_of(images, labels, 4),
        total=10,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert torch.equal(predictions.labels, labels)
    torch.testing.assert_close(predictions.logits["float"], module(images).detach())


def test_no_images():
    with pytest.raises(InputError, match="no readable image"):
        predict({"float": lambda x: x}, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_gives_no_numbers_is_an_error_not_an_accuracy(value):
    def broken(images):
        return torch.full((len(images), 4), value)

    with pytest.raises(MetaAugError, match="simulated gives NaN or infinite logits on 2 of 2"):
        predict({"simulated": broken}, [(torch.zeros(2, 3, 2, 2), None)])


def test_outputs_that_are_no_logits():
    with pytest.raises(InputError, match=r"\(2, 3, 2, 2\)"):
        predict({"float": lambda x: x}, [(torch.zeros(2, 3, 2, 2), None)])


def test_networks_with_different_class_counts():
    with pytest.raises(InputError, match="float 3, onnxruntime 4"):
        predict(
            {"float": lambda x: torch.zeros(len(x), 3), "onnxruntime": lambda x: torch.zeros(len(x), 4)},
            [(torch.zeros(2, 3, 2, 2), None)],
        )


def test_labels_beyond_the_classes():
    with pytest.raises(InputError, match="class index 9") as caught:
        predict(
            {"float": lambda x: torch.zeros(len(x), 3)}, [(torch.zeros(2, 3, 2, 2), torch.tensor([0, 9]))]
        )
    assert "--classes" in caught.value.hint


def test_a_single_output_decides_between_two_classes_at_0(caplog):
    values = {"float": [-2.0, -1.0, 1.0, 3.0], "onnxruntime": [-1.0, 0.5, 2.0, 0.25]}
    labels = torch.tensor([0, 1, 1, 0])
    predictors = {name: lambda x, v=v: torch.tensor(v)[:, None] for name, v in values.items()}
    evaluation = score(predict(predictors, [(torch.zeros(4, 3, 2, 2), labels)]))
    float_score, runtime = evaluation.scores["float"], evaluation.scores["onnxruntime"]
    assert evaluation.classes == 2
    assert runtime.agreement == {"float": 0.75}
    assert (float_score.top1, runtime.top1, runtime.drop) == (0.5, 0.75, -25.0)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(values["float"]), labels.float()
    )
    assert float_score.nll == pytest.approx(expected.item())
    assert runtime.max_logit_difference == {"float": 2.75}
    assert caplog.text == ""


def test_a_probability_in_place_of_a_logit_is_pointed_out(caplog):
    predict({"float": lambda x: torch.full((len(x), 1), 0.25)}, [(torch.zeros(2, 3, 2, 2), None)])
    assert "the single output of float lies in 0..1" in caplog.text
