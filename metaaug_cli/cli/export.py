"""``metaaug export`` writes a run as an ONNX file; ``metaaug inspect`` reads such a file back."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaaug_cli.cli.bench import run_bench
from metaaug_cli.cli.console import Column, Console
from metaaug_cli.cli.options import OUTPUT_PANEL, JsonOpt, QuietOpt
from metaaug_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from metaaug_cli.deployment.export import ExportResult
    from metaaug_cli.deployment.manifest import Manifest
    from metaaug_cli.deployment.onnx_summary import OnnxSummary
    from metaaug_cli.deployment.ort import KernelCount
    from metaaug_cli.deployment.packing import PackMode
    from metaaug_cli.deployment.runtimes import Release

EXPORT_EPILOG = """\
[bold]The file to deploy[/bold], integer kernels in ONNX Runtime
  metaaug export runs/r18 -o r18.onnx

[bold]Two to four times smaller[/bold], the same kernels
  metaaug export runs/r18 -o r18.onnx --pack packed

[bold]For the runtime at hand[/bold]: the smallest form it runs as integers
  metaaug export runs/r18 -o r18.onnx --target-ort 1.22

[bold]For old x86 servers[/bold], exact without any session option
  metaaug export runs/r18 -o r18.onnx --reduce-range

[bold]What it is worth here[/bold]: latency and size of every form
  metaaug export runs/r18 -o r18.onnx --bench"""

INSPECT_EPILOG = """\
[bold]Bits and scales of every layer[/bold], from any tool's QDQ file
  metaaug inspect r18.onnx

[bold]For scripts[/bold]
  metaaug inspect r18.onnx --json | jq .manifest.metrics"""

_NAMED_NODES = 6
_OLDEST_OPSET, _OLDEST_IR = 21, 10  # the greatest that ONNX Runtime 1.20 reads


class Pack(StrEnum):
    """How codes under 8 bits are stored."""

    INT8 = "int8"
    PACKED = "packed"
    NATIVE = "native"


RunArg = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory of metaaug quantize.", show_default=False)
]
OutOpt = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="ONNX file to write.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
PackOpt = Annotated[
    Pack | None,
    typer.Option(
        "--pack",
        help="int8 (default): 8-bit containers. packed: 4- and 2-bit storage, unpacked while loading. "
        "native: 4- and 2-bit ONNX types, no integer kernels in ONNX Runtime.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
TargetOpt = Annotated[
    str | None,
    typer.Option(
        "--target-ort",
        metavar="VERSION",
        help="ONNX Runtime release, 1.22 say, that must run the file as integers; refuses a --pack it "
        "cannot, and chooses the smallest one it can.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
BenchOpt = Annotated[
    bool,
    typer.Option(
        "--bench",
        help="Time float and the forms int8, packed and native (of W8A8 only int8) on this machine: one "
        "thread, batch 1 and 8, as ratios to float.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
ReduceRangeOpt = Annotated[
    bool,
    typer.Option(
        "--reduce-range",
        help="Store 8-bit weights so that x86 CPUs without VNNI are exact without an option; slower there.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
FileArg = Annotated[Path, typer.Argument(metavar="FILE", help="A quantized ONNX file.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add both commands to the application."""
    app.command("export", epilog=EXPORT_EPILOG)(export)
    app.command("inspect", epilog=INSPECT_EPILOG)(inspect)


def export(
    run: RunArg,
    out: OutOpt,
    pack: PackOpt = None,
    target_ort: TargetOpt = None,
    reduce_range: ReduceRangeOpt = False,
    bench: BenchOpt = False,
    json: JsonOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Write a run as an ONNX file that computes what was simulated.

    Every way of packing computes the same function. The summary shows the
    size, what it takes to load the file, and which operators ONNX Runtime
    really runs as integers.
    """
    console = Console(quiet=quiet, json=json)
    if out.is_dir():
        raise InputError(f"{out} is a directory", hint=f"name a file: -o {out / (run.name + '.onnx')}")
    if out.suffix != ".onnx":
        raise UsageError(
            f"-o {out} does not end in .onnx, by which evaluate and other tools know the format",
            hint=f"-o {out.with_suffix('.onnx')}",
        )

    from metaaug_cli.deployment.export import export_onnx
    from metaaug_cli.deployment.ort import count_kernels
    from metaaug_cli.deployment.runtimes import parse_release
    from metaaug_cli.runs.finished import load_run

    target = parse_release(target_ort) if target_ort is not None else None
    loaded = load_run(run)
    manifest = loaded.manifest()
    console.note(f"exporting {loaded.info['model']} from {run}")
    result = export_onnx(
        loaded.deployed_module,
        input_size=loaded.input_size,
        path=out,
        manifest=manifest,
        pack=_chosen_pack(pack, target, manifest),
        reduce_range=reduce_range,
        target=target,
    )
    kernels = count_kernels(out, options=result.manifest.packing.session_options)
    saturating = _saturating(out)
    _show_export(console, result, kernels, saturating)
    data = _export_data(result, kernels, saturating)
    if target is not None:
        _show_target(console, target)
        data["target_onnxruntime"] = target_ort
    if bench:
        data["latency"] = run_bench(console, loaded)
    console.data(data)


def _chosen_pack(pack: Pack | None, target: Release | None, manifest: Manifest) -> PackMode:
    """What to export; ``packed`` for a release without kernels for 2 bits is storage in 4 bits."""
    from metaaug_cli.deployment.runtimes import choose_pack

    if target is None:
        return "int8" if pack is None else pack.value
    smallest = choose_pack(set(manifest.weight_bits.values()), target)
    if pack is None or (pack is Pack.PACKED and smallest == "packed4"):
        return smallest
    return pack.value


def _show_target(console: Console, target: Release) -> None:
    from metaaug_cli.deployment.runtimes import NEWEST, format_release

    if target > NEWEST:
        console.warn(
            f"ONNX Runtime {format_release(target)} is newer than {format_release(NEWEST)}, the newest that "
            "was measured; check the file with `metaaug evaluate` there"
        )
    else:
        console.note(f"ONNX Runtime {format_release(target)} runs this form as integers")


def _saturating(path: Path) -> list[str]:
    import onnx

    from metaaug_cli.deployment.packing import saturating_layers

    return saturating_layers(onnx.load(path))


def _show_export(console: Console, result: ExportResult, kernels: KernelCount, saturating: list[str]) -> None:
    packing = result.manifest.packing
    ratio = result.float_bytes / result.size_bytes
    rows = [
        ("size", f"{_megabytes(result.size_bytes)} ({_compared(ratio)} than float weights)"),
        ("codes", _PACK_TEXT[packing.mode]),
        ("loads in", f"ONNX Runtime {packing.least_onnxruntime} or later (1.20 is the oldest tried)"),
        ("session options", _options_text(packing.session_options)),
        ("integer kernels", _kernel_text(kernels)),
    ]
    console.table(str(result.path), [Column("", "left"), Column("", "left")], rows)
    if packing.mode == "native" and packing.session_options:
        _warn_native(console, result)
    if kernels.float_nodes and packing.mode != "native":
        console.note(f"left in float: {_some(kernels.float_nodes)}")
    if saturating:
        _note_saturation(console, saturating)


def _compared(ratio: float) -> str:
    return f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times larger"


def _note_saturation(console: Console, layers: list[str]) -> None:
    from metaaug_cli.deployment.ort import EXACT_OPTION

    console.note(
        f"x86 CPUs without VNNI need the session option {EXACT_OPTION}=1 to be exact in {len(layers)} layers "
        f"with 8-bit weights ({_some(layers)}); --reduce-range exports weights that do not"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_NODES} more" if len(names) > _NAMED_NODES else ""
    return ", ".join(names[:_NAMED_NODES]) + more


_PACK_TEXT = {
    "int8": "in 8-bit containers (--pack int8)",
    "packed": "packed, unpacked while loading (--pack packed)",
    "native": "in 4- and 2-bit ONNX types (--pack native)",
}


def _warn_native(console: Console, result: ExportResult) -> None:
    from metaaug_cli.deployment.ort import open_session

    option = _options_text(result.manifest.packing.session_options)
    try:
        open_session(result.path, threads=1)
    except InputError as error:
        console.warn(f"{error.message}\nIt loads with the session option {option}, and runs in float.")
    else:
        console.warn(f"other releases may refuse the file unless the session option {option} is set")


def _options_text(options: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "none"


def _kernel_text(kernels: KernelCount) -> str:
    kinds = [kind for kind in ("Conv", "Gemm", "MatMul", "Add", "Concat", "Mul") if kernels.of(kind)[1]]
    return ", ".join("{} {} of {}".format(kind, *kernels.of(kind)) for kind in kinds) or "none"


def _export_data(result: ExportResult, kernels: KernelCount, saturating: list[str]) -> dict[str, Any]:
    packing = result.manifest.packing
    return {
        "file": str(result.path),
        "bytes": result.size_bytes,
        "float_bytes": result.float_bytes,
        "pack": packing.mode,
        "least_onnxruntime": packing.least_onnxruntime,
        "session_options": packing.session_options,
        "kernels": kernels.to_dict(),
        "saturating_layers": saturating,
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def inspect(file: FileArg, json: JsonOpt = None, quiet: QuietOpt = False) -> None:
    """Show bits and scales per layer of a quantized ONNX file, and its manifest.

    Works on QDQ files of other tools too; they have no manifest, so bits are
    those that hold the codes found.
    """
    from metaaug_cli.deployment.onnx_summary import summarize_onnx

    console = Console(quiet=quiet, json=json)
    summary = summarize_onnx(file)
    _show_header(console, summary)
    _show_layers(console, summary)
    _show_activations(console, summary)
    console.data(summary.to_dict())


def _show_header(console: Console, summary: OnnxSummary) -> None:
    versions = f"opset {summary.opset}, IR {summary.ir_version}"
    loads = f"ONNX Runtime {summary.least_onnxruntime} or later (1.20 is the oldest tried)"
    if summary.unknown_operators:
        loads = f"nothing without a library for {', '.join(summary.unknown_operators)}"
    elif summary.manifest is None and (summary.opset > _OLDEST_OPSET or summary.ir_version > _OLDEST_IR):
        loads += ", as far as its codes go; its opset may need a newer one"
    rows: list[tuple[str, object]] = [
        ("size", f"{_megabytes(summary.size_bytes)}, {versions}"),
        ("written by", summary.producer),
        ("loads in", loads),
    ]
    if summary.manifest is not None:
        rows += _manifest_rows(summary.manifest)
    if summary.float_layers:
        rows.append(("float layers", ", ".join(summary.float_layers)))
    if summary.saturating:
        rows.append(("8-bit sums", f"{len(summary.saturating)} layers need an option on x86 without VNNI"))
    console.table(str(summary.path), [Column("", "left"), Column("", "left")], rows)
    if summary.manifest is None:
        console.note("no metaaug manifest: bits are those that hold the codes found in the graph")
    if not summary.layers and not summary.activations:
        console.warn("the file has no quantized weights and no activation quantizers")


def _manifest_rows(manifest: Manifest) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("model", manifest.model),
        ("method", f"{manifest.method}, {manifest.placement} placement"),
        ("packing", manifest.packing.mode),
        ("options", _options_text(manifest.packing.session_options)),
    ]
    hashes = {
        "recipe": manifest.recipe_sha256,
        "weights": manifest.weights_sha256,
        "calibration": manifest.calibration_sha256,
    }
    rows += [(f"{name} hash", digest[:16]) for name, digest in hashes.items() if digest]
    if manifest.preprocessing:
        rows.append(("preprocessing", _preprocessing_text(manifest.preprocessing)))
    evaluation = manifest.metrics.get("evaluation")
    if isinstance(evaluation, dict):
        rows += _accuracy_rows(evaluation)
    rows.append(("made with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())))
    return rows


def _preprocessing_text(stored: dict[str, Any]) -> str:
    from metaaug_cli.networks.preprocessing import Preprocessing

    return Preprocessing.from_dict(stored).describe()


def _accuracy_rows(evaluation: dict[str, Any]) -> list[tuple[str, object]]:
    images = f"{evaluation.get('images')} images of {evaluation.get('data')}"
    rows: list[tuple[str, object]] = [("measured on", images)]
    for name, result in evaluation.items():
        if isinstance(result, dict) and result.get("top1") is not None:
            rows.append((f"top-1 {name}", f"{100 * result['top1']:.2f} %"))
    return rows


def _show_layers(console: Console, summary: OnnxSummary) -> None:
    if not summary.layers:
        return
    rows = [
        (
            layer.name,
            layer.op,
            layer.bits,
            layer.stored,
            "x".join(map(str, layer.shape)),
            _scales(layer.least_scale, layer.greatest_scale),
            layer.bias,
        )
        for layer in summary.layers
    ]
    left = [Column(title, "left") for title in ("weights of", "op")]
    console.table("Weights", [*left, "bits", "type", "shape", "scales", "bias"], rows)


def _scales(least: float, greatest: float) -> str:
    return f"{least:.3g}" if least == greatest else f"{least:.2g}..{greatest:.2g}"


def _show_activations(console: Console, summary: OnnxSummary) -> None:
    if not summary.activations:
        return
    rows = [
        (a.name, a.bits, a.stored, f"{a.low}..{a.high}", a.zero_point, f"{a.scale:.4g}")
        for a in summary.activations
    ]
    console.table("Activations", ["quantizer", "bits", "type", "codes", "zero point", "scale"], rows)
