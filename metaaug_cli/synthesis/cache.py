"""Synthetic images kept for later runs: they take minutes and depend on the network alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path

import torch

from metaaug_cli.calibration.data import CalibrationSet, load_calibration_set, save_calibration_set
from metaaug_cli.errors import InputError
from metaaug_cli.files import cache_directory
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.synthesis.dgh import SynthesisSettings, Tick, fingerprint, synthesize_calibration_set

_logger = logging.getLogger(__name__)


def cached_synthetic_set(
    model: LoadedModel, settings: SynthesisSettings, *, device: torch.device, tick: Tick | None = None
) -> CalibrationSet:
    """The set of ``synthesize_calibration_set``, from the cache where it was made before.

    One that was interrupted goes on where it stopped. Without a writable cache nothing is kept.

    Raises:
        InputError: The network has no batch norms.
        GraphError: The network computes NaN or infinite values.
    """
    path = _path(model, settings, device)
    if path is None:
        return synthesize_calibration_set(model, settings, device=device, tick=tick)
    if path.exists():
        with contextlib.suppress(InputError):  # damaged: made again
            stored = load_calibration_set(path, preprocessing=model.preprocessing, num=settings.num)
            _logger.info("synthetic images from %s", path)
            return stored
    state = path.with_suffix(".partial")
    made = synthesize_calibration_set(
        model, settings, device=device, state_path=state, resume=True, state_required=False, tick=tick
    )
    try:
        save_calibration_set(made, path)
    except (InputError, OSError) as error:  # the run can go on; only the next one has to make them again
        _logger.warning("synthetic images are not kept: %s", error)
    state.unlink(missing_ok=True)
    return made


def is_cached(model: LoadedModel, settings: SynthesisSettings, *, device: torch.device) -> bool:
    """Whether an earlier run has made the set of ``cached_synthetic_set``."""
    path = _path(model, settings, device)
    return path is not None and path.exists()


def _path(model: LoadedModel, settings: SynthesisSettings, device: torch.device) -> Path | None:
    """Where the set belongs; None where nothing can be written."""
    cache = cache_directory()
    if cache is None:
        return None
    folder = cache / "synthetic"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    key = [fingerprint(model, settings), device.type, torch.__version__]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{name}.safetensors"
