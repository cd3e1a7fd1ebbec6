"""What ``metaaug evaluate`` is pointed at, a run directory or an ONNX file, made ready to predict."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch.export import ExportedProgram

from metaaug_cli.deployment.manifest import Manifest, read_manifest
from metaaug_cli.deployment.onnx_summary import require_file
from metaaug_cli.deployment.ort import open_session
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.models import LoadedModel, load_model
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.verification.evaluation import (
    FLOAT,
    ONNXRUNTIME,
    SIMULATED,
    Predictor,
    onnx_predictor,
    program_predictor,
    require_image_input,
    torch_predictor,
)
from metaaug_cli.verification.openvino_check import OPENVINO, OpenVinoLayers, open_openvino

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """One network in all the versions that are at hand.

    Attributes:
        name: For people, ``resnet18 W4A4`` for one.
        preprocessing: How images become its input; every version shares it.
        predictors: By name, in the order to show them.
        onnx_path: The ONNX file that ``onnxruntime`` runs.
        session_options: What ONNX Runtime needs to load it.
        deployed: The simulation as it was exported, for the parity check; ``None`` for a bare file.
        num_outputs: Number of logits.
        openvino: What OpenVINO runs of the file, where it is one of the predictors.
    """

    name: str
    preprocessing: Preprocessing
    predictors: dict[str, Predictor]
    onnx_path: Path
    session_options: Mapping[str, str]
    deployed: IntegerSimulation | None
    num_outputs: int
    openvino: OpenVinoLayers | None = None


def open_target(
    path: Path, *, onnx_path: Path | None = None, model: str | None = None, options: Mapping[str, Any]
) -> Target:
    """Open a run directory or an ONNX file.

    Args:
        path: Directory that ``metaaug quantize`` wrote, or any ``.onnx`` file.
        onnx_path: For a directory only: a file exported from it, instead of its own.
        model: For a file only: the float network to compare with.
        options: For a file only: keyword arguments of ``load_model``, without ``model`` fields of
            ``Preprocessing``.

    Raises:
        InputError: The path is neither, or its parts do not fit each other.
        UsageError: Flags that do not go with the target.
    """
    if path.is_dir():
        if model is not None or options:
            flags = ["--model"] * (model is not None) + [f"--{name}" for name in options]
            raise UsageError(
                f"{', '.join(flags)} cannot be combined with a run directory, which knows its model",
                hint="leave them out, or evaluate the exported .onnx file instead",
            )
        return _open_run(path, onnx_path)
    if onnx_path is not None:
        raise UsageError(
            f"--onnx goes with a run directory, and {path} is none", hint="give one file as TARGET"
        )
    if not path.exists():
        raise InputError(f"{path} does not exist", hint="give a run directory or an .onnx file")
    if path.suffix != ".onnx":
        raise InputError(f"{path} is neither a run directory nor an .onnx file")
    return _open_onnx(path, model, options)


def add_openvino(target: Target) -> Target:
    """The same target with OpenVINO as one more predictor, on the file that ONNX Runtime runs.

    Raises:
        InputError: OpenVINO is not installed, or refuses the file.
    """
    predictor, layers = open_openvino(target.onnx_path)
    return replace(target, predictors={**target.predictors, OPENVINO: predictor}, openvino=layers)


def _open_run(path: Path, onnx_path: Path | None) -> Target:
    from metaaug_cli.runs.finished import load_run

    run = load_run(path)
    file = onnx_path or run.onnx_path
    manifest = _manifest_of(file)
    session_options = manifest.packing.session_options if manifest else {}
    session = open_session(file, options=session_options)
    _check_input_shape(session, run.preprocessing)
    bits = run.recipe.quantization
    simulation = IntegerSimulation(run.deployed_module)
    return Target(
        name=f"{run.info['model']} W{bits.weight_bits}A{bits.act_bits}, {bits.placement} placement",
        preprocessing=run.preprocessing,
        predictors={
            FLOAT: torch_predictor(run.float_module),
            SIMULATED: torch_predictor(simulation),
            ONNXRUNTIME: onnx_predictor(session),
        },
        onnx_path=file,
        session_options=session_options,
        deployed=simulation,
        num_outputs=run.num_outputs,
    )


def _open_onnx(path: Path, spec: str | None, options: Mapping[str, Any]) -> Target:
    manifest = _manifest_of(path)
    session_options = manifest.packing.session_options if manifest else {}
    session = open_session(path, options=session_options)
    if spec is None and "weights" in options:
        raise UsageError("--weights needs --model", hint="--model FILE.py:FACTORY names the float network")
    stored = Preprocessing.from_dict(manifest.preprocessing) if manifest and manifest.preprocessing else None
    loaded = load_model(spec, **options, fallback=stored) if spec is not None else None
    preprocessing = _preprocessing(loaded, stored, options)
    predictors: dict[str, Predictor] = {FLOAT: _float_predictor(loaded)} if loaded else {}
    predictors[ONNXRUNTIME] = onnx_predictor(session)
    _check_input_shape(session, preprocessing)
    num_outputs = _count_outputs(predictors[ONNXRUNTIME], preprocessing)
    return Target(
        name=f"{path.name}, made from {manifest.model}" if manifest else path.name,
        preprocessing=preprocessing,
        predictors=predictors,
        onnx_path=path,
        session_options=session_options,
        deployed=None,
        num_outputs=num_outputs,
    )


def _count_outputs(predictor: Predictor, preprocessing: Preprocessing) -> int:
    logits = predictor(torch.zeros(1, preprocessing.channels, *preprocessing.size))
    if logits.dim() != 2:
        raise InputError(
            f"the file gives an output of shape {tuple(logits.shape)}, not one row of logits an image",
            hint="metaaug evaluates image classifiers: its first output must be (images, classes)",
        )
    return logits.shape[1]


def _manifest_of(path: Path) -> Manifest | None:
    require_file(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as exc:  # protobuf raises its own classes, which derive from Exception only
        raise InputError(f"{path} is not a readable ONNX file") from exc
    return read_manifest(model)


def _preprocessing(
    loaded: LoadedModel | None, stored: Preprocessing | None, options: Mapping[str, Any]
) -> Preprocessing:
    """How the images are prepared for every version: the flags first, then what the file was made for."""
    if stored is not None:
        chosen = replace(stored, **{k: v for k, v in options.items() if k != "weights"})
        if loaded is not None and (differences := loaded.preprocessing.differences(chosen)):
            _logger.warning(
                "--model prepares its images otherwise than the file, whose way is used (%s)",
                "; ".join(differences),
            )
        return chosen
    if loaded is not None:
        return loaded.preprocessing
    missing = [f"--{name}" for name in ("size", "mean", "std") if name not in options]
    if missing:
        raise UsageError(
            f"the file does not say how to prepare its images: {', '.join(missing)} missing",
            hint="give --size, --mean and --std, or name the network it was made from with --model",
        )
    return Preprocessing(**{"resize": "auto", "interpolation": "bilinear", **options})


def _float_predictor(loaded: LoadedModel) -> Predictor:
    if isinstance(loaded.module, ExportedProgram):
        return program_predictor(loaded.module)
    return torch_predictor(loaded.module)


def _check_input_shape(session: onnxruntime.InferenceSession, preprocessing: Preprocessing) -> None:
    wanted = (preprocessing.channels, *preprocessing.size)
    require_image_input(session)
    shape = session.get_inputs()[0].shape[1:]
    if any(isinstance(have, int) and have != want for have, want in zip(shape, wanted, strict=True)):
        raise InputError(
            f"the file takes images of (channels, height, width) {tuple(shape)}, "
            f"but the preprocessing makes {wanted}",
            hint="set --size, and --mean and --std with one value per channel",
        )
