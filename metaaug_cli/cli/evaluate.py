"""``metaaug evaluate``: accuracy, agreement, parity and kernels of a run directory or an ONNX file."""

from __future__ import annotations

import json as jsonlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaaug_cli.cli.console import Console, listed
from metaaug_cli.cli.evaluation_view import show_report
from metaaug_cli.cli.options import (
    DATA_PANEL,
    MODEL_PANEL,
    OUTPUT_PANEL,
    ClassesOpt,
    InterpolationOpt,
    JsonOpt,
    MeanOpt,
    QuietOpt,
    ResizeOpt,
    SizeOpt,
    StdOpt,
    WeightsOpt,
    model_options,
)
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.files import require_report_place, write_atomically

if TYPE_CHECKING:
    from metaaug_cli.calibration.data import ImageFolder
    from metaaug_cli.verification.parity import Parity
    from metaaug_cli.verification.report import Report
    from metaaug_cli.verification.targets import Target

GATE_PANEL = "Gates (a missed one is exit code 1)"
_PARITY_IMAGES = 256

EPILOG = """\
[bold]A run directory[/bold], float, simulated and in ONNX Runtime side by side
  metaaug evaluate runs/r18 --data ./val

[bold]A gate in CI[/bold]: JSON and JUnit reports, exit code 1 when a limit is missed
  metaaug evaluate runs/r18 --data ./val --max-drop 1.0 \\
    --min-agreement 0.99 --parity --json report.json --junit gates.xml

[bold]An exported file[/bold], with the float network to compare it with
  metaaug evaluate r18.onnx --data ./val --model resnet18

[bold]A file from another tool[/bold], which does not say how to prepare images
  metaaug evaluate other.onnx --data ./val --size 224 \\
    --mean .485,.456,.406 --std .229,.224,.225

[bold]Exit codes[/bold]: 0 done, 1 gate missed, 2 usage or input, 3 run failed"""

TargetArg = Annotated[
    Path, typer.Argument(metavar="TARGET", help="Run directory, or any .onnx file.", show_default=False)
]
DataOpt = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Images, one folder per class; without class folders agreement and parity only.",
        rich_help_panel=DATA_PANEL,
    ),
]
NoLabelsOpt = Annotated[
    bool, typer.Option("--no-labels", help="Folders are not classes.", rich_help_panel=DATA_PANEL)
]
NumOpt = Annotated[
    int | None,
    typer.Option(
        "--num", metavar="N", help="Only so many images, drawn at random.", min=1, rich_help_panel=DATA_PANEL
    ),
]
SeedOpt = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of --num.", rich_help_panel=DATA_PANEL)
]
BatchOpt = Annotated[
    int,
    typer.Option("--batch", metavar="N", help="Images at a time.", min=1, rich_help_panel=DATA_PANEL),
]
MaxDropOpt = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        help="Most points of top-1 that may be lost against float.",
        rich_help_panel=GATE_PANEL,
    ),
]
MinAgreementOpt = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="FRACTION",
        help="Least fraction of images with float's top-1 class, 0.99 say.",
        rich_help_panel=GATE_PANEL,
    ),
]
ParityOpt = Annotated[
    bool,
    typer.Option(
        "--parity",
        help="ONNX Runtime must compute what was simulated: the same codes, layer by layer.",
        rich_help_panel=GATE_PANEL,
    ),
]
OnnxOpt = Annotated[
    Path | None,
    typer.Option(
        "--onnx",
        metavar="FILE",
        help="For a run directory: run this file exported from it, not the run's own.",
        rich_help_panel=MODEL_PANEL,
    ),
]
OpenVinoOpt = Annotated[
    bool,
    typer.Option(
        "--openvino",
        help="Run the file in OpenVINO too: 8-bit layers there, agreement with ONNX Runtime.",
        rich_help_panel=MODEL_PANEL,
    ),
]
ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="For an .onnx file: the float network to compare with, on images prepared as the file says.",
        rich_help_panel=MODEL_PANEL,
    ),
]
JunitOpt = Annotated[
    Path | None,
    typer.Option(
        "--junit", metavar="FILE", help="JUnit XML with each gate as a test.", rich_help_panel=OUTPUT_PANEL
    ),
]


@dataclass(frozen=True)
class _Limits:
    max_drop: float | None
    min_agreement: float | None
    parity: bool

    @property
    def any(self) -> bool:
        return self.parity or self.max_drop is not None or self.min_agreement is not None


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("evaluate", epilog=EPILOG)(evaluate)


def evaluate(
    target: TargetArg,
    data: DataOpt,
    onnx: OnnxOpt = None,
    classes: ClassesOpt = None,
    no_labels: NoLabelsOpt = False,
    num: NumOpt = None,
    seed: SeedOpt = 0,
    batch: BatchOpt = 64,
    max_drop: MaxDropOpt = None,
    min_agreement: MinAgreementOpt = None,
    parity: ParityOpt = False,
    openvino: OpenVinoOpt = False,
    model: ModelOpt = None,
    weights: WeightsOpt = None,
    size: SizeOpt = None,
    resize: ResizeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    interpolation: InterpolationOpt = None,
    json: JsonOpt = None,
    junit: JunitOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Measure accuracy, agreement with float, and parity with ONNX Runtime.

    TARGET is a directory that metaaug quantize wrote, or any ONNX image
    classifier. The table compares the versions of the network on the same
    images; drops are paired, so their standard error is small.

    --model, --weights and the flags on preprocessing are for an ONNX file; a
    run directory holds its network and how images are prepared for it.
    """
    limits = _Limits(max_drop, min_agreement, parity)
    if junit is not None and not limits.any:
        raise UsageError(
            "--junit has no gate to show", hint="add --max-drop, --min-agreement or --parity, or use --json"
        )
    if junit is not None:
        _check_junit(junit, json)
    options = model_options(
        weights=weights, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation
    )
    console = Console(quiet=quiet, json=json)

    from metaaug_cli.verification.gates import check_limits, check_possible, require
    from metaaug_cli.verification.report import report_to_dict, write_junit
    from metaaug_cli.verification.targets import add_openvino, open_target

    check_limits(max_drop=max_drop, min_agreement=min_agreement)
    folder = _scan(data, classes, no_labels)
    opened = open_target(target, onnx_path=onnx, model=model, options=options)
    opened = add_openvino(opened) if openvino else opened
    _check_classes(folder, opened.num_outputs)
    check_possible(
        opened.predictors,
        labelled=folder.labels is not None,
        max_drop=max_drop,
        min_agreement=min_agreement,
    )
    if parity and opened.deployed is None:
        raise UsageError(
            "--parity needs the simulation, which a bare .onnx file does not hold",
            hint="evaluate the run directory; --onnx FILE checks a file exported from it",
        )
    console.note(f"{opened.name}: {opened.preprocessing.describe()}")
    report = _measure(console, target, opened, folder, _draw(folder, num, seed), batch, limits)
    show_report(console, report)
    console.data(report_to_dict(report))
    if junit is not None:
        write_junit(junit, report.gates, target=str(target), properties=_properties(report))
        console.note(f"gates written to {junit}")
    if target.is_dir():
        _record(console, target, report)
    require(report.gates)


def _check_junit(junit: Path, json: str | None) -> None:
    require_report_place("--junit", junit)
    if json is not None and Path(json).absolute() == junit.absolute():
        raise UsageError(f"--json and --junit both name {junit}", hint="give them a file each")


def _scan(data: Path, classes: Path | None, no_labels: bool) -> ImageFolder:
    from metaaug_cli.calibration.data import scan_folder

    if no_labels and classes is not None:
        raise UsageError("--classes and --no-labels contradict each other", hint="give one of them")
    folder = scan_folder(data, classes_file=classes)
    return replace(folder, labels=None, classes=None) if no_labels else folder


def _check_classes(folder: ImageFolder, num_outputs: int) -> None:
    from metaaug_cli.calibration.data import check_class_count

    try:
        check_class_count(folder, num_outputs)
    except InputError as exc:
        raise InputError(exc.message, hint=f"{exc.hint}; --no-labels measures agreement only") from None


def _draw(folder: ImageFolder, num: int | None, seed: int) -> list[int]:
    """Which images to use: all, or a simple random sample, whose accuracy is unbiased."""
    everything = range(len(folder.paths))
    if num is None or num >= len(everything):
        return list(everything)
    return sorted(random.Random(seed).sample(everything, num))


def _measure(
    console: Console,
    path: Path,
    opened: Target,
    folder: ImageFolder,
    indices: Sequence[int],
    batch: int,
    limits: _Limits,
) -> Report:
    from metaaug_cli.calibration.data import iter_labelled_batches
    from metaaug_cli.deployment.manifest import package_versions
    from metaaug_cli.deployment.ort import count_kernels
    from metaaug_cli.verification.evaluation import predict, score
    from metaaug_cli.verification.gates import accuracy_gates, parity_gates
    from metaaug_cli.verification.openvino_check import summarize
    from metaaug_cli.verification.report import (
        SCHEMA_VERSION,
        DataSummary,
        Kernels,
        Report,
        describe_onnx,
        summarize_parity,
    )

    skipped: list[str] = []
    batches = iter_labelled_batches(
        folder, opened.preprocessing, batch_size=batch, indices=indices, skipped=skipped
    )
    with console.progress("evaluate") as tick:
        predictions = predict(opened.predictors, batches, total=len(indices), progress=tick)
    evaluation = score(predictions)
    if skipped:
        console.warn(listed("unreadable files skipped", skipped))
    found = _check_parity(console, opened, folder, indices, batch, gated=limits.parity)
    kernels = count_kernels(opened.onnx_path, options=opened.session_options)
    gates = accuracy_gates(evaluation, max_drop=limits.max_drop, min_agreement=limits.min_agreement)
    if found is not None and limits.parity:
        gates += parity_gates(found, evaluation)
    return Report(
        schema_version=SCHEMA_VERSION,
        target=str(path),
        data=DataSummary(
            folder=str(folder.root),
            images=evaluation.images,
            available=len(folder.paths),
            labelled=evaluation.labelled,
            skipped=tuple(skipped),
        ),
        onnx=describe_onnx(opened.onnx_path),
        evaluation=evaluation,
        parity=None if found is None else summarize_parity(found),
        kernels=Kernels(dict(kernels.integer), dict(kernels.floating), kernels.float_nodes),
        gates=tuple(gates),
        passed=all(gate.passed for gate in gates),
        versions=package_versions(),
        openvino=None if opened.openvino is None else summarize(opened.openvino, evaluation.scores),
    )


def _check_parity(
    console: Console,
    opened: Target,
    folder: ImageFolder,
    indices: Sequence[int],
    batch: int,
    *,
    gated: bool,
) -> Parity | None:
    """The gate takes every image and the integer reference; the mere verdict a sample without it."""
    from metaaug_cli.calibration.data import iter_labelled_batches
    from metaaug_cli.verification.parity import check_parity

    if opened.deployed is None:
        return None
    if not gated and len(indices) > _PARITY_IMAGES:
        indices = sorted(random.Random(0).sample(indices, _PARITY_IMAGES))
    batches = iter_labelled_batches(folder, opened.preprocessing, batch_size=batch, indices=indices)
    with console.progress("parity") as tick:
        return check_parity(
            opened.onnx_path,
            opened.deployed,
            (images for images, _ in batches),
            reference=gated,
            progress=lambda done, _: tick(done, len(indices)),
        )


def _record(console: Console, run_dir: Path, report: Report) -> None:
    """Keep the accuracy in the run's metrics, from which an exported file's manifest takes it."""
    from metaaug_cli.runs.artifacts import METRICS_FILE, read_metrics

    path = run_dir / METRICS_FILE
    metrics = read_metrics(run_dir)
    metrics["evaluation"] = {
        "data": Path(report.data.folder).name,
        "images": report.data.images,
        **{
            name: {"top1": result.top1, "agreement": result.agreement.get("float")}
            for name, result in report.evaluation.scores.items()
        },
    }
    try:
        write_atomically(path, jsonlib.dumps(metrics, indent=2) + "\n")
    except (InputError, OSError) as exc:
        console.warn(f"{exc}; an exported file will not state the accuracy")


def _properties(report: Report) -> dict[str, object]:
    """What a CI page may want to show beside the gates."""
    found: dict[str, object] = {"images": report.data.images, "onnx sha256": report.onnx.sha256}
    for name, result in report.evaluation.scores.items():
        if result.top1 is not None:
            found[f"top-1 {name}"] = result.top1
    return found
