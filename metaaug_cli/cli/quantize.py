"""``metaaug quantize``: parse, call ``pipeline.quantize``, show."""

from __future__ import annotations

import itertools
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from metaaug_cli.cli.console import Console, listed, resume_hint
from metaaug_cli.cli.options import (
    InterpolationOpt,
    JsonOpt,
    MeanOpt,
    ModelArg,
    QuietOpt,
    ResizeOpt,
    SizeOpt,
    StdOpt,
    WeightsOpt,
    model_options,
    require_device,
)
from metaaug_cli.cli.quantize_options import (
    ABitsOpt,
    AugmentOpt,
    BatchOpt,
    CacheOpt,
    CalibOpt,
    DeviceOpt,
    HoldoutOpt,
    IterationsOpt,
    MethodOpt,
    NumOpt,
    OutOpt,
    PlacementOpt,
    PlanOpt,
    RecipeOpt,
    ResumeOpt,
    SeedOpt,
    SetOpt,
    SyntheticOpt,
    WBitsOpt,
)
from metaaug_cli.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from metaaug_cli.calibration.data import CalibrationSet
    from metaaug_cli.networks.models import LoadedModel
    from metaaug_cli.recipe.config import Recipe
    from metaaug_cli.runs.artifacts import RunDirectory

_FEW_IMAGES = 64

EPILOG = """\
[bold]Examples[/bold]
  metaaug quantize resnet18 --calib ./imgs --wbits 2 --abits 4
  metaaug quantize net.py:make_net --weights net.safetensors --calib ./imgs \\
      --size 224 --mean .485,.456,.406 --std .229,.224,.225
  metaaug quantize resnet18 --calib ./imgs --recipe w4a4 --plan
  metaaug quantize resnet18 --calib ./imgs --set reconstruction.quant_prob=0.7
  metaaug quantize resnet18 --calib ./imgs --recipe few-shot-32 --holdout 4

[bold]Then[/bold]
  metaaug evaluate RUN --data DIR      accuracy, and parity with ONNX Runtime
  metaaug export RUN -o FILE.onnx      the QDQ file"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("quantize", epilog=EPILOG)(quantize)


def quantize(
    model: ModelArg,
    calib: CalibOpt,
    out: OutOpt = None,
    weights: WeightsOpt = None,
    size: SizeOpt = None,
    resize: ResizeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    interpolation: InterpolationOpt = None,
    num: NumOpt = None,
    holdout: HoldoutOpt = None,
    synthetic: SyntheticOpt = None,
    recipe: RecipeOpt = None,
    wbits: WBitsOpt = None,
    abits: ABitsOpt = None,
    method: MethodOpt = None,
    placement: PlacementOpt = None,
    augment: AugmentOpt = None,
    iterations: IterationsOpt = None,
    batch: BatchOpt = None,
    seed: SeedOpt = None,
    set_: SetOpt = None,
    device: DeviceOpt = "auto",
    cache_gb: CacheOpt = None,
    resume: ResumeOpt = False,
    plan: PlanOpt = False,
    quiet: QuietOpt = False,
    json: JsonOpt = None,
) -> None:
    """Quantize a network with a folder of images.

    Learns weight roundings and scales block by block so that the quantized
    network computes what the float one does. Keeps each finished block in a run
    directory, which evaluate and export read.
    """
    console = Console(quiet=quiet, json=json)
    flags = {
        "--num": ("calibration.num", num),
        "--holdout": ("calibration.holdout", holdout),
        "--synthetic": ("calibration.synthetic", synthetic),
        "--wbits": ("quantization.weight_bits", wbits),
        "--abits": ("quantization.act_bits", abits),
        "--placement": ("quantization.placement", placement),
        "--augment": ("augmentation.kind", augment),
        "--method": ("reconstruction.method", method),
        "--iterations": ("reconstruction.iterations", iterations),
        "--batch": ("reconstruction.batch_size", batch),
        "--seed": ("seed", seed),
    }
    require_device(device)
    resolved = _resolve_recipe(recipe, flags, set_ or [])
    _warn_of_settings_without_effect(console, resolved, set_ or [])
    options = model_options(
        weights=weights, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation
    )

    if out is not None and not plan:
        _require_free(console, out, resume=resume)

    from metaaug_cli.memory import keep_freed_memory
    from metaaug_cli.networks.models import load_model
    from metaaug_cli.prepare import fitted_to

    keep_freed_memory()
    loaded = load_model(model, **{**resolved.preprocessing.load_options(), **options})
    calibration = _load_calibration(console, calib, loaded, resolved)
    resolved = fitted_to(resolved, calibration)
    _show_inputs(console, loaded, calibration)
    _hint_at_augmentation(console, loaded, calibration, resolved)
    if plan:
        from metaaug_cli.cli.plan_view import show_plan

        show_plan(console, loaded, calibration, resolved, device)
        return
    with ExitStack() as stack:
        run_dir = _claim_directory(stack, out, loaded.name, resolved, resume=resume)
        stack.enter_context(resume_hint(lambda: _how_to_continue(run_dir, named=out is not None)))
        stack.enter_context(_log_file(run_dir))
        _run(console, loaded, calibration, resolved, run_dir, device=device, cache_gb=cache_gb, resume=resume)


def _resolve_recipe(name: str | None, flags: dict[str, tuple[str, Any]], assignments: list[str]) -> Recipe:
    """The recipe with the flags, which give (field, value or None), and then ``--set`` on top."""
    from metaaug_cli.recipe.config import Recipe, load_recipe

    recipe = load_recipe(name) if name else Recipe()
    given = [f"{key}={value}" for key, value in flags.values() if value is not None]
    try:
        recipe = recipe.override(given, where="flags")
    except RecipeError as error:
        text = error.message
        for flag, (key, _) in flags.items():
            text = text.replace(f"{key}:", f"{flag}:")
        raise UsageError(text, hint="metaaug quantize --help shows every option, with examples") from None
    return recipe.override(assignments)


def _warn_of_settings_without_effect(console: Console, recipe: Recipe, assignments: list[str]) -> None:
    """Settings of an augmenter that is not learned: more likely a forgotten flag than meant."""
    from metaaug_cli.prepare import augmentation_kind, learns_augmenter

    given = [a for a in assignments if a.strip().startswith("metaaug.")]
    if given and not learns_augmenter(recipe):
        kind = augmentation_kind(recipe)
        console.warn(
            f"--set {given[0].strip()} has no effect: augmentation.kind comes to {kind}, so no augmenter is "
            "learned (--augment metaaug)"
        )


def _load_calibration(console: Console, calib: Path, loaded: LoadedModel, recipe: Recipe) -> CalibrationSet:
    from metaaug_cli.calibration.data import load_calibration_set

    with console.progress("reading images") as tick:
        return load_calibration_set(
            calib,
            preprocessing=loaded.preprocessing,
            num=recipe.calibration.num,
            seed=recipe.seed,
            progress=tick,
        )


def _show_inputs(console: Console, loaded: LoadedModel, calibration: CalibrationSet) -> None:
    console.note(f"model        {loaded.name}, weights: {loaded.weights}")
    console.note(f"images       {loaded.preprocessing.describe()}")
    console.note(f"calibration  {len(calibration.images)} images, {calibration.origin}")
    if calibration.skipped:
        console.warn(listed("unreadable files skipped", calibration.skipped))
    if calibration.duplicates:
        console.note(
            f"{len(calibration.duplicates)} copies of other images left out "
            "(metaaug calibrate build names them)"
        )


def _hint_at_augmentation(
    console: Console, loaded: LoadedModel, calibration: CalibrationSet, recipe: Recipe
) -> None:
    """What docs/benchmarks.md says of few images and of many, where the user has not chosen otherwise."""
    from torch import nn

    from metaaug_cli.prepare import has_few_bits, learns, learns_augmenter

    images = len(calibration.images)
    few = images <= _FEW_IMAGES
    if not few and recipe.augmentation.kind == "auto" and learns_augmenter(recipe):
        console.note(
            f"MetaAug runs by default at 2 bits; with more than {_FEW_IMAGES} images it gained little or "
            "nothing where it was measured, and --augment none is faster"
        )
    remembers = isinstance(loaded.module, nn.Module) and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in loaded.module.modules()
    )
    made = calibration.holds_synthetic or recipe.calibration.synthetic
    if few and has_few_bits(recipe) and learns(recipe) and remembers and not made:
        console.note(f"{images} are few: --synthetic 256 adds images made from the network's batch norms")


def _require_free(console: Console, out: Path, *, resume: bool) -> None:
    from metaaug_cli.runs.artifacts import RunDirectory

    directory = RunDirectory(out)
    directory.require_utf8()
    directory.require_free(resume=resume)
    if resume and not directory.holds_run:
        console.note(f"--resume: there is no run in {out} yet, so this one starts afresh")


def _claim_directory(stack: ExitStack, out: Path | None, name: str, recipe: Recipe, *, resume: bool) -> Path:
    """Choose the run directory and keep other processes from writing into it."""
    for directory in _directories(out, name, recipe, resume=resume):
        directory.require_utf8()
        try:
            stack.enter_context(directory.claim(resume=resume))
        except UsageError:
            if out is not None or resume:
                raise
        else:
            return directory.path
    raise AssertionError("the numbers do not end")


def _directories(out: Path | None, name: str, recipe: Recipe, *, resume: bool) -> Iterator[RunDirectory]:
    """``--out``, or ``runs/MODEL-wWaA`` and that with numbers; to resume, the last of them."""
    from metaaug_cli.runs.artifacts import RunDirectory

    if out is not None:
        return iter([RunDirectory(out)])
    bits = recipe.quantization
    base = Path("runs") / f"{name.replace('/', '_')}-w{bits.weight_bits}a{bits.act_bits}"
    numbered = (base.with_name(f"{base.name}-{n}") for n in itertools.count(2))
    candidates = map(RunDirectory, itertools.chain([base], numbered))
    if not resume:
        return candidates
    runs = [d for d in itertools.takewhile(lambda d: d.path.exists(), candidates) if d.holds_run]
    if not runs:
        raise UsageError(f"--resume: there is no run in {base}", hint="name the run directory with --out")
    return iter(runs[-1:])


def _how_to_continue(run_dir: Path, *, named: bool) -> str:
    """What is kept and the command that goes on, with the run's directory where ``--out`` did not name it."""
    from metaaug_cli.runs.artifacts import RunDirectory

    again = [argument for argument in sys.argv[1:] if argument != "--resume"]
    command = f"metaaug {shlex.join([*again, *([] if named else ['--out', str(run_dir)]), '--resume'])}"
    finished = RunDirectory(run_dir).finished_blocks
    kept = f"{finished} finished block{'s are' if finished > 1 else ' is'} kept" if finished else ""
    return f"{kept or 'no block was finished yet'}; continue with\n{command}"


@contextmanager
def _log_file(run_dir: Path) -> Iterator[None]:
    """Keep the library's log in the run directory."""
    from metaaug_cli.runs.artifacts import LOG_FILE

    handler = _RunLog(run_dir / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("metaaug_cli")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _RunLog(logging.FileHandler):
    """A log that ends with the disk's space: what the run itself cannot write is told."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Leave the line out."""


def _run(
    console: Console,
    loaded: LoadedModel,
    calibration: CalibrationSet,
    recipe: Recipe,
    run_dir: Path,
    *,
    device: str,
    cache_gb: float | None,
    resume: bool,
) -> None:
    from metaaug_cli.cli.run_progress import RunProgress
    from metaaug_cli.cli.run_view import show_result
    from metaaug_cli.pipeline import quantize as quantize_network

    with console.progress("quantizing") as tick:
        progress = RunProgress(console, tick)
        result = quantize_network(
            loaded,
            calibration,
            recipe=recipe,
            run_dir=run_dir,
            resume=resume,
            device=device,
            cache_gb=cache_gb,
            command=f"metaaug {shlex.join(sys.argv[1:])}",
            progress=progress,
        )
    show_result(console, recipe, result, run_dir)
