"""How an evaluation looks in the terminal: one table, the parity verdict, the kernels, the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metaaug_cli.cli.console import Console

if TYPE_CHECKING:
    from metaaug_cli.verification.evaluation import Evaluation, Score
    from metaaug_cli.verification.openvino_check import OpenVinoReport
    from metaaug_cli.verification.parity import LayerParity
    from metaaug_cli.verification.report import Kernels, ParityReport, Report

_SHOWN = {"float": "float", "simulated": "simulated", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_KINDS = ("Conv", "Gemm", "Add")
_NAMED_NODES = 5
_NAMED_LAYERS = 8


def show_report(console: Console, report: Report) -> None:
    """Everything a report holds, for people."""
    show_evaluation(console, report.evaluation, title=f"{report.target} on {_images(report.data.images)}")
    console.result("")
    if report.parity is not None:
        gated = any(gate.name.startswith("parity") for gate in report.gates)
        show_parity(console, report.parity, verdict=not gated)
    show_kernels(console, report.kernels)
    if report.openvino is not None:
        show_openvino(console, report.openvino)
    for gate in report.gates:
        console.verdict(gate.passed, f"{gate.name}: {gate.text}")


def show_evaluation(console: Console, evaluation: Evaluation, *, title: str) -> None:
    """The accuracy table: one row per version of the network."""
    others = [name for name in ("float", "simulated") if name in evaluation.scores]
    columns = ["network"]
    if evaluation.labelled:
        columns += ["top-1", "drop", "top-5", "NLL", "ECE"]
        title += "\npercent; drop in points of top-1 with its paired standard error"
    columns += [f"agreement\n{_SHOWN[name]}" for name in others]
    rows = []
    for name, result in evaluation.scores.items():
        row: list[object] = [_SHOWN.get(name, name)]
        if evaluation.labelled:
            nll = None if result.nll is None else f"{result.nll:.3f}"
            row += [_percent(result.top1), _drop(result), _percent(result.top5), nll, _percent(result.ece)]
        rows.append(row + [_percent(result.agreement.get(other)) for other in others])
    console.table(title, columns, rows)


def show_parity(console: Console, parity: ParityReport, *, verdict: bool = True) -> None:
    """The verdict, and the layers out of tolerance when it is bad.

    Args:
        console: Where to show it.
        parity: What was found.
        verdict: Whether to say PASS or FAIL here; with gates they say it.
    """
    if not parity.passed:
        broken = [
            layer for layer in parity.layers if not (layer.simulation_agrees and layer.reference_agrees)
        ]
        _show_layers(console, broken)
    codes = sum(layer.codes for layer in parity.layers)
    forced = sum(layer.forced.mismatches for layer in parity.layers)
    steps = max((layer.forced.max_steps for layer in parity.layers), default=0)
    by = f", by at most {steps} level{'s' * (steps != 1)}" if forced else ""
    console.result(
        f"{forced} of {codes} codes differ layer by layer{by}; max |Δlogit| "
        f"{parity.max_logit_difference:.2g} (std {parity.logit_std:.2g}); {_images(parity.images)}"
    )
    if verdict:
        text = f"all {len(parity.layers)} code tensors within tolerance" if parity.passed else parity.verdict
        console.verdict(parity.passed, f"parity: {text}")


def _show_layers(console: Console, layers: Sequence[LayerParity]) -> None:
    if not layers:
        return
    rows = [
        (
            layer.name,
            layer.codes,
            layer.forced.mismatches,
            layer.forced.max_steps,
            layer.free.mismatches,
            None if layer.reference is None else layer.reference.mismatches,
        )
        for layer in layers[:_NAMED_LAYERS]
    ]
    more = f" (the first {_NAMED_LAYERS} of {len(layers)})" if len(layers) > _NAMED_LAYERS else ""
    title = f"layers out of tolerance{more}, codes that differ from ONNX Runtime"
    console.table(title, ["layer", "codes", "forced", "levels", "free", "reference"], rows)


def show_kernels(console: Console, kernels: Kernels) -> None:
    """How many nodes ONNX Runtime runs as integers, and which it does not."""
    integer = sum(kernels.integer.get(kind, 0) for kind in _KINDS)
    total = integer + sum(kernels.floating.get(kind, 0) for kind in _KINDS)
    console.result(f"{integer} of {total} {'/'.join(_KINDS)} nodes run as integers")
    floats = [node for node in kernels.float_nodes if node.split(" ")[0] in _KINDS]
    if integer and floats:
        more = f" and {len(floats) - _NAMED_NODES} more" if len(floats) > _NAMED_NODES else ""
        console.result(f"in float: {', '.join(floats[:_NAMED_NODES])}{more}")


def show_openvino(console: Console, openvino: OpenVinoReport) -> None:
    """What a second runtime makes of the file."""
    kernels = openvino.kernels
    console.result(
        f"OpenVINO {kernels.version}: {kernels.integer} of {kernels.layers} convolutions and linear layers "
        f"run as 8-bit; {_percent(openvino.agreement)} % agreement with ONNX Runtime, max |Δlogit| "
        f"{openvino.max_logit_difference:.2g}"
    )
    if kernels.float_layers:
        more = f" and {len(kernels.float_layers) - _NAMED_NODES} more"
        shown = ", ".join(kernels.float_layers[:_NAMED_NODES])
        console.result(f"in float there: {shown}{more if len(kernels.float_layers) > _NAMED_NODES else ''}")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.2f}"


def _drop(result: Score) -> str | None:
    if result.drop is None:
        return None
    error = "" if result.drop_stderr is None else f"±{result.drop_stderr:.2f}"
    return f"{result.drop:.2f}{error}"
