"""What the ``calibrate`` commands share: sets read for a model, shown, and summed up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaaug_cli.cli.console import Console, listed
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.files import require_writable

if TYPE_CHECKING:
    from metaaug_cli.calibration.data import CalibrationSet
    from metaaug_cli.calibration.inspection import ChannelStatistics
    from metaaug_cli.graph.bn_statistics import BatchNormProbe
    from metaaug_cli.networks.models import LoadedModel
    from metaaug_cli.networks.preprocessing import Preprocessing


def load_model_for(path: Path, model: str, options: dict[str, Any]) -> LoadedModel:
    """The model that a set is judged by; one that states no preprocessing gets the stored set's."""
    from metaaug_cli.calibration.data import load_calibration_set
    from metaaug_cli.networks.models import load_model

    fallback = load_calibration_set(path, num=1).preprocessing if path.is_file() else None
    return load_model(model, **options, fallback=fallback)


def read_set(
    path: Path, preprocessing: Preprocessing | None, console: Console, *, num: int, seed: int
) -> CalibrationSet:
    """A stored set as it is, or images drawn from a folder and prepared for a model.

    Raises:
        UsageError: A folder, and nothing says how to prepare its images.
    """
    from metaaug_cli.calibration.data import load_calibration_set

    if not path.is_dir():
        return load_calibration_set(path, num=sys.maxsize)
    if preprocessing is None:
        raise UsageError(
            f"{path} is a folder, so the model's preprocessing is needed to read it",
            hint=f"metaaug calibrate inspect {path} --model MODEL",
        )
    with console.progress(f"preparing {path.name}") as progress:
        return load_calibration_set(path, preprocessing=preprocessing, num=num, seed=seed, progress=progress)


def probe_of(loaded: LoadedModel, calibration: CalibrationSet, alternative: str) -> BatchNormProbe:
    """The network's batch norms at the size of the set's images.

    Raises:
        InputError: It has none; ``alternative`` says what works without them.
    """
    from metaaug_cli.graph.bn_statistics import batch_norm_probe

    channels, height, width = calibration.images.shape[1:]
    try:
        return batch_norm_probe(loaded.module, (channels, height, width))
    except InputError as exc:
        raise InputError(exc.message, hint=alternative) from exc


def facts(calibration: CalibrationSet) -> dict[str, Any]:
    """What ``calibrate build --json`` reports of a set, in plain JSON types."""
    from metaaug_cli.calibration.inspection import class_counts

    return {
        "num": len(calibration.images),
        "num_classes": len(class_counts(calibration)),
        "origin": calibration.origin,
        "preprocessing": calibration.preprocessing.to_dict(),
        "sha256": calibration.sha256,
        "skipped": list(calibration.skipped),
        "duplicates": list(calibration.duplicates),
        "outliers": list(calibration.outliers),
    }


def show(
    calibration: CalibrationSet, channels: tuple[ChannelStatistics, ...], console: Console, *, name: str
) -> None:
    """The statistics of a set as a table, with what made it."""
    rows = [
        (
            channel.name,
            f"{channel.mean:.1f}",
            f"{channel.std:.1f}",
            f"{channel.low:.0f}-{channel.high:.0f}",
            f"{channel.black:.2%}",
            f"{channel.white:.2%}",
            f"{channel.normalised_mean:+.3f}",
            f"{channel.normalised_std:.3f}",
        )
        for channel in channels
    ]
    found = facts(calibration)
    classes = f", {found['num_classes']} classes" if found["num_classes"] else ""
    title = f"{name}: {found['num']} images{classes}, {calibration.origin}"
    columns = ["channel", "mean", "std", "range", "black", "white", "mean'", "std'"]
    console.table(title, columns, rows)
    console.result("pixels on the 0 to 255 scale; ' marks what the network is given")
    console.result(calibration.preprocessing.describe())
    console.result(f"sha256 {calibration.sha256}")
    warn_about(calibration, console)


def warn_about(calibration: CalibrationSet, console: Console, *, wanted: int = 0) -> None:
    """Name the first five of what was skipped, left out or stands out; say when there are too few images."""
    if calibration.skipped:
        console.warn(listed("files skipped", calibration.skipped))
    if calibration.duplicates:
        console.note(listed("copies left out", calibration.duplicates))
    if calibration.outliers:
        console.note(listed("images stand out (they are kept)", calibration.outliers))
    if len(calibration.images) < wanted:
        console.note(f"{wanted} images were asked for, the folder has {len(calibration.images)}")


def require_output(path: Path, suffix: str, flag: str) -> None:
    """Refuse an output file of another type, or one that cannot be written, before any work is done.

    Raises:
        UsageError: With the name it may have.
        InputError: It cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(f"{flag} {path} must end in {suffix}", hint=f"{flag} {path.with_suffix(suffix)}")
    require_writable(path)
