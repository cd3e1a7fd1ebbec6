"""Limits a user puts on an evaluation; a missed one is exit code 1, after everything was shown."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from metaaug_cli.errors import GateError, UsageError
from metaaug_cli.verification.evaluation import FLOAT, ONNXRUNTIME, SIMULATED, Evaluation
from metaaug_cli.verification.parity import MIN_TOP1_AGREEMENT, Parity

MAX_ACCURACY_DIFFERENCE = 0.1
"""Points of top-1 that simulation and runtime may differ by."""


@dataclass(frozen=True)
class Gate:
    """One limit and what was measured against it.

    Attributes:
        name: The flag without its dashes, ``max-drop`` for one.
        passed: Whether the limit holds.
        measured: The value, in the unit of the limit; ``None`` when it has none.
        limit: The limit; ``None`` when it is not a number.
        text: A sentence with both, for people.
    """

    name: str
    passed: bool
    measured: float | None
    limit: float | None
    text: str


def check_limits(*, max_drop: float | None, min_agreement: float | None) -> None:
    """Refuse limits that can only be a slip, before anything runs.

    Raises:
        UsageError: A negative drop, or an agreement that is no fraction.
    """
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise UsageError(
            f"--max-drop {max_drop:g} is not between 0 and 100",
            hint="it counts points of top-1: --max-drop 1.0",
        )
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        percent = min_agreement / 100
        hint = f"--min-agreement {percent:g} is {min_agreement:g} %" if 1 < min_agreement <= 100 else None
        raise UsageError(f"--min-agreement {min_agreement:g} is not a fraction between 0 and 1", hint=hint)


def check_possible(
    predictors: Collection[str], *, labelled: bool, max_drop: float | None, min_agreement: float | None
) -> None:
    """Refuse limits that this evaluation cannot measure, before it runs.

    Args:
        predictors: Names of the versions to be evaluated.
        labelled: Whether the images have labels.
        max_drop: Most points of top-1 that may be lost.
        min_agreement: Least fraction of images with the float network's top-1 class.

    Raises:
        UsageError: No float network to compare with, or no labels for a drop.
    """
    if max_drop is None and min_agreement is None:
        return
    if FLOAT not in predictors:
        raise UsageError(
            "--max-drop and --min-agreement compare with the float network, and none is given",
            hint="evaluate a run directory, or name the network with --model and --weights",
        )
    if max_drop is not None and not labelled:
        raise UsageError(
            "--max-drop needs labels, and the images have none",
            hint="put the images in one folder per class, or use --min-agreement",
        )


def accuracy_gates(
    evaluation: Evaluation, *, max_drop: float | None = None, min_agreement: float | None = None
) -> list[Gate]:
    """Judge what will be deployed against the float network.

    The exported file is judged where there is one, else the simulation.

    Args:
        evaluation: Scores with ``float`` among them.
        max_drop: Most points of top-1 that may be lost.
        min_agreement: Least fraction of images with the float network's top-1 class.

    Raises:
        UsageError: As for :func:`check_possible`.
    """
    check_possible(
        evaluation.scores, labelled=evaluation.labelled, max_drop=max_drop, min_agreement=min_agreement
    )
    judged = ONNXRUNTIME if ONNXRUNTIME in evaluation.scores else SIMULATED
    gates = []
    if max_drop is not None:
        result = evaluation.scores[judged]
        assert result.drop is not None  # labels and the float network are there
        stderr = f" ± {result.drop_stderr:.2f}" if result.drop_stderr is not None else ""
        text = f"{judged} loses {result.drop:.2f}{stderr} points of top-1; at most {max_drop:g} allowed"
        gates.append(Gate("max-drop", result.drop <= max_drop, result.drop, max_drop, text))
    if min_agreement is not None:
        agreement = evaluation.scores[judged].agreement[FLOAT]
        text = f"{judged} agrees with float on {_percent(agreement)} of the images; "
        text += f"at least {100 * min_agreement:g} % asked for"
        gates.append(Gate("min-agreement", agreement >= min_agreement, agreement, min_agreement, text))
    return gates


def parity_gates(parity: Parity, evaluation: Evaluation) -> list[Gate]:
    """Judge whether ONNX Runtime computes what was simulated.

    Args:
        parity: Comparison of the codes, with the integer reference.
        evaluation: Scores on the same file; with labels the accuracies must agree too.
    """
    gates = [
        Gate(
            "parity-reference",
            parity.gate_a and parity.undisturbed,
            None,
            None,
            _reference(parity),
        ),
        Gate(
            "parity-simulation", parity.gate_b, parity.top1_agreement, MIN_TOP1_AGREEMENT, _simulation(parity)
        ),
    ]
    simulated, runtime = (evaluation.scores[name].top1 for name in (SIMULATED, ONNXRUNTIME))
    if simulated is not None and runtime is not None:
        gates.append(_accuracy_gate(simulated, runtime, evaluation.images))
    return gates


def _reference(parity: Parity) -> str:
    layer = parity.first_inexact
    if not parity.undisturbed:
        return "reading the codes changes ONNX Runtime's logits, so nothing can be compared"
    if layer is not None and layer.reference is not None:
        return (
            f"{layer.name} is the first layer to differ from the integer reference: "
            f"{layer.reference.mismatches} of {layer.codes} codes; worst: {layer.reference.worst}"
        )
    if not parity.gate_a:
        agreement = _percent(parity.reference_top1_agreement or 0.0)
        return f"the integer reference has the same codes, but the same top-1 class only on {agreement}"
    if not parity.all_integer:
        return (
            "integer kernels give the codes of the integer reference; what follows float operators is close"
        )
    return "ONNX Runtime gives exactly the codes and top-1 classes of the integer reference"


def _simulation(parity: Parity) -> str:
    layer = parity.first_out_of_tolerance
    if layer is not None:
        steps = layer.forced.max_steps
        return (
            f"{layer.name} is the first layer to leave tolerance: {layer.forced.mismatches} of {layer.codes} "
            f"codes differ, by at most {steps} level{'s' * (steps != 1)}; worst: {layer.forced.worst}"
        )
    return f"every layer within tolerance, top-1 agreement {_percent(parity.top1_agreement)}"


def _accuracy_gate(simulated: float, runtime: float, images: int) -> Gate:
    points = 100 * abs(round(simulated * images) - round(runtime * images)) / images
    # On a small folder one image weighs more than the limit.
    limit = max(MAX_ACCURACY_DIFFERENCE, 100 / images)
    text = f"simulation and ONNX Runtime differ by {points:.2f} points of top-1; at most {limit:.2f} allowed"
    return Gate("parity-accuracy", points <= limit, points, limit, text)


def require(gates: Sequence[Gate]) -> None:
    """Raise when a gate was missed; call it last.

    Raises:
        GateError: Names every missed gate.
    """
    missed = [gate for gate in gates if not gate.passed]
    if missed:
        names = ", ".join(gate.name for gate in missed)
        raise GateError(f"{len(missed)} of {len(gates)} gates missed: {names}")


def _percent(fraction: float) -> str:
    # Rounding must not turn 0.99996 into a limit of 100 that was missed.
    return (
        f"{100 * fraction:.2f} %"
        if round(100 * fraction, 2) < 100 or fraction == 1
        else f"{100 * fraction:.4f} %"
    )
