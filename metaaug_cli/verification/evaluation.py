"""Accuracy of several versions of one network on the same images, side by side.

A version is a *predictor*: a function from normalised images to logits. A single logit decides between two
classes at 0; it is taken as the second of two, the first being 0. Three are usual: ``float`` (the
network as it came), ``simulated`` (the quantized network in torch) and ``onnxruntime`` (the exported file).
Differences between them are paired, image by image, so their standard error is far below that of either
accuracy.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from metaaug_cli.errors import InputError, MetaAugError
from metaaug_cli.graph.capture import with_free_names

if TYPE_CHECKING:
    import onnxruntime

_logger = logging.getLogger(__name__)
FLOAT, SIMULATED, ONNXRUNTIME = "float", "simulated", "onnxruntime"
CALIBRATION_BINS = 15

Predictor = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Predictions:
    """What every predictor answered on the same images.

    Attributes:
        logits: Per predictor, float32 (images, classes); two classes where there is a single output.
        labels: int64 (images,), or ``None`` when the images have no labels.
    """

    logits: dict[str, Tensor]
    labels: Tensor | None


@dataclass(frozen=True)
class Score:
    """How one predictor did; fractions are in 0..1, and what needs labels is ``None`` without them.

    Attributes:
        top1: Fraction of images whose largest logit is the label's.
        top5: The same for the five largest; ``None`` with five classes or fewer.
        nll: Mean negative log-likelihood of the label, in nats.
        ece: Expected calibration error (Guo et al., ICML 2017), 15 bins, L1.
        drop: Points of top-1 lost against the reference; negative is a gain.
        drop_stderr: Standard error of ``drop`` in points, paired over images.
        agreement: Per other predictor, fraction of images with the same top-1 class.
        max_logit_difference: Per other predictor, the largest absolute difference of a logit.
    """

    top1: float | None
    top5: float | None
    nll: float | None
    ece: float | None
    drop: float | None
    drop_stderr: float | None
    agreement: dict[str, float]
    max_logit_difference: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Scores of every predictor on the same images, in the order they were given.

    Attributes:
        images: How many images were used.
        classes: How many classes each predictor tells apart: one a logit, two for a single one.
        labelled: Whether the images have labels.
        reference: The predictor that ``drop`` is measured against.
        scores: One score per predictor.
    """

    images: int
    classes: int
    labelled: bool
    reference: str
    scores: dict[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain values, ready for JSON."""
        return asdict(self)


def torch_predictor(module: nn.Module) -> Predictor:
    """Run a torch module without gradients, on the device of its parameters or buffers."""
    tensor = next(iter(module.parameters()), next(iter(module.buffers()), torch.empty(0)))

    def call(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, module(images.to(tensor.device)))

    return call


def program_predictor(program: ExportedProgram) -> Predictor:
    """Run an exported program, whatever batch size it was exported with."""
    program = with_free_names(program)
    name = program.graph_signature.user_inputs[0]
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    batch = value.shape[0]
    call = torch_predictor(program.module())
    return in_batches_of(batch, call) if isinstance(batch, int) else call


def onnx_predictor(session: "onnxruntime.InferenceSession") -> Predictor:
    """Run an ONNX Runtime session on images, whatever batch size its file asks for.

    Raises:
        InputError: The file does not take one batch of float images.
    """
    require_image_input(session)
    first, output = session.get_inputs()[0], session.get_outputs()[0]
    if not output.type.startswith("tensor(") or output.type == "tensor(string)":
        raise InputError(
            f"the file's first output, {output.name}, is {output.type}, not numbers",
            hint="metaaug evaluates image classifiers: its first output must be (images, classes)",
        )

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {first.name: images.contiguous().numpy()})[0])

    return in_batches_of(first.shape[0], call) if isinstance(first.shape[0], int) else call


def require_image_input(session: "onnxruntime.InferenceSession") -> None:
    """Refuse a file that does not take one batch of float images.

    Raises:
        InputError: It takes something else, or nothing.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
        listed = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs) or "nothing"
        raise InputError(
            f"the file does not take one batch of float32 images (n, channels, height, width) but {listed}",
            hint="metaaug evaluates image classifiers that take float images",
        )


def in_batches_of(size: int, predictor: Predictor) -> Predictor:
    """Give a predictor exactly ``size`` images at a time, filling the last batch up with zeros."""

    def call(images: Tensor) -> Tensor:
        parts = []
        for chunk in images.split(size):
            missing = chunk.new_zeros(size - len(chunk), *chunk.shape[1:])
            parts.append(predictor(torch.cat([chunk, missing]))[: len(chunk)])
        return torch.cat(parts)

    return call


def predict(
    predictors: Mapping[str, Predictor],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    total: int | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Run every predictor on every batch.

    Args:
        predictors: By name; each maps normalised images (n, channels, height, width) to logits (n, classes).
        batches: Images and their labels, or ``None`` for labels throughout.
        total: Number of images to come, for the progress.
        progress: Called with the images done and their total.

    Raises:
        InputError: No image, predictors that do not fit each other, or labels outside the classes.
        MetaAugError: A predictor gave a value that is not finite.
    """
    logits: dict[str, list[Tensor]] = {name: [] for name in predictors}
    labels: list[Tensor] = []
    done = 0
    for images, targets in batches:
        for name, predictor in predictors.items():
            logits[name].append(_checked(name, predictor(images), len(images)))
        if targets is not None:
            labels.append(targets.to(torch.int64).cpu())
        done += len(images)
        if progress is not None:
            progress(done, total or done)
    if not done:
        raise InputError("there is no readable image to evaluate on", hint="check the folder given to --data")
    joined = {name: _as_classes(name, torch.cat(parts)) for name, parts in logits.items()}
    _check_class_counts(joined)
    target = torch.cat(labels) if labels else None
    if target is not None:
        _check_labels(target, done, next(iter(joined.values())).shape[1])
    return Predictions(joined, target)


def score(predictions: Predictions, *, reference: str = FLOAT) -> Evaluation:
    """Score every predictor, and each against the others.

    Args:
        predictions: From :func:`predict`.
        reference: The predictor that drops are measured against; without it drops are ``None``.
    """
    first = next(iter(predictions.logits.values()))
    scores = {name: _score_one(name, predictions, reference) for name in predictions.logits}
    return Evaluation(
        images=len(first),
        classes=first.shape[1],
        labelled=predictions.labels is not None,
        reference=reference,
        scores=scores,
    )


def paired_drop(candidate: Tensor, reference: Tensor) -> tuple[float, float | None]:
    """Points of accuracy lost from ``reference`` to ``candidate``, and their paired standard error.

    Args:
        candidate: bool (images,), where the candidate is right.
        reference: bool (images,), where the reference is right, on the same images.

    Returns:
        The drop and its standard error in points; no error from a single image.
    """
    lost = reference.to(torch.float64) - candidate.to(torch.float64)
    # Divide last: 100 * 14 / 1000 is the double that "1.4" reads as, and 100 * (14 / 1000) may lie above
    # that, so that a limit of exactly 1.4 points would be missed.
    drop = 100 * lost.sum().item() / len(lost)
    if len(lost) < 2:
        return drop, None
    return drop, 100 * lost.std().item() / math.sqrt(len(lost))


def _score_one(name: str, predictions: Predictions, reference: str) -> Score:
    logits, labels = predictions.logits[name], predictions.labels
    others = {other: value for other, value in predictions.logits.items() if other != name}
    top1 = top5 = nll = ece = drop = stderr = None
    if labels is not None:
        classes = logits.shape[1]
        top1 = _accuracy(logits, labels, 1)
        top5 = _accuracy(logits, labels, 5) if classes > 5 else None
        nll = F.cross_entropy(logits.double(), labels).item()
        # torchmetrics takes values that all lie in 0..1 for probabilities, so logits would be ambiguous.
        ece = multiclass_calibration_error(
            logits.softmax(1), labels, num_classes=classes, n_bins=CALIBRATION_BINS, norm="l1"
        ).item()
        if reference in others:
            right = logits.argmax(1) == labels
            drop, stderr = paired_drop(right, others[reference].argmax(1) == labels)
    return Score(
        top1=top1,
        top5=top5,
        nll=nll,
        ece=ece,
        drop=drop,
        drop_stderr=stderr,
        agreement={other: _agreement(logits, value) for other, value in others.items()},
        max_logit_difference={other: (logits - value).abs().max().item() for other, value in others.items()},
    )


def _accuracy(logits: Tensor, labels: Tensor, top_k: int) -> float:
    value = multiclass_accuracy(logits, labels, num_classes=logits.shape[1], top_k=top_k, average="micro")
    # torchmetrics divides in float32; the exact fraction is nearby.
    return round(float(value) * len(labels)) / len(labels)


def _agreement(a: Tensor, b: Tensor) -> float:
    return int((a.argmax(1) == b.argmax(1)).sum()) / len(a)


def _checked(name: str, output: Tensor, images: int) -> Tensor:
    logits = output.detach().to("cpu", torch.float32)
    if logits.dim() != 2 or logits.shape[0] != images:
        raise InputError(
            f"{name} gives shape {tuple(logits.shape)} for {images} images, not one row of logits each",
            hint="metaaug evaluates image classifiers: one 2-D output, (images, classes)",
        )
    broken = int((~logits.isfinite()).any(1).sum())
    if broken:
        raise MetaAugError(
            f"{name} gives NaN or infinite logits on {broken} of {images} images in a batch",
            hint="check that the weights belong to the model, and --mean and --std",
        )
    return logits


def _as_classes(name: str, logits: Tensor) -> Tensor:
    """The same logits, or two columns for a single one."""
    if logits.shape[1] > 1:
        return logits
    if logits.min() >= 0 and logits.max() <= 1:
        _logger.warning(
            "the single output of %s lies in 0..1, as a probability does; it is taken as a logit, so all "
            "images count as the second class: give the network without its sigmoid",
            name,
        )
    return torch.cat([torch.zeros_like(logits), logits], 1)


def _check_class_counts(logits: Mapping[str, Tensor]) -> None:
    counts = {name: value.shape[1] for name, value in logits.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(
            f"the networks differ in their number of classes: {listed}",
            hint="compare a file with the model it was made from (--model)",
        )


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    if len(labels) != images:
        raise InputError(f"{images} images but {len(labels)} labels")
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise InputError(
            f"the folder has class index {int(labels.max())}, but the network gives {classes} classes",
            hint="--classes FILE lists the class folder names in index order",
        )
