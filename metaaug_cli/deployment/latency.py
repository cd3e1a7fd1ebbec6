"""How long ONNX files take on this machine, side by side: medians of interleaved rounds.

One file after the other in every round, so that a busy moment of the machine hits all of them alike.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from metaaug_cli.deployment.export import INPUT_NAME, OPSET, OUTPUT_NAME, export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.deployment.ort import open_session
from metaaug_cli.deployment.packing import PackMode
from metaaug_cli.errors import GraphError

FLOAT = "float"
BATCHES = (1, 8)
ROUNDS = 11
_WARM_UP = 2
_PACKS: tuple[PackMode, ...] = ("int8", "packed", "native")


@dataclass(frozen=True)
class Candidate:
    """A file to time.

    Args:
        path: The file.
        options: Session options it needs.
    """

    path: Path
    options: Mapping[str, str]


@dataclass(frozen=True)
class Latency:
    """What was measured of one file.

    Args:
        size_bytes: Size of the file.
        milliseconds: Batch size to the median time of one call.
    """

    size_bytes: int
    milliseconds: Mapping[int, float]


def measure_forms(
    float_module: nn.Module,
    deployed: nn.Module,
    input_size: tuple[int, int, int],
    *,
    rounds: int = ROUNDS,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Latency]:
    """Time the float network against every way of packing the quantized one.

    Args:
        float_module: Network before quantization.
        deployed: The same network as ``export_onnx`` takes it.
        input_size: (C, H, W).
        rounds: Rounds whose median is taken.
        threads: Threads per operator.
        progress: Called with rounds done and to do.

    Returns:
        By ``float`` and name of the packing; those whose file is not smaller than the int8 one are left out.
    """
    manifest = Manifest(model="latency", placement="integer", method="")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        export_float(float_module, input_size, path)
        candidates = {FLOAT: Candidate(path, {})}
        for pack in _PACKS:
            path = Path(folder) / f"{pack}.onnx"
            written = export_onnx(deployed, input_size=input_size, path=path, manifest=manifest, pack=pack)
            same = pack != "int8" and written.size_bytes >= candidates["int8"].path.stat().st_size
            if not same:
                candidates[pack] = Candidate(path, written.manifest.packing.session_options)
        return measure(candidates, input_size, rounds=rounds, threads=threads, progress=progress)


def measure(
    candidates: Mapping[str, Candidate],
    input_size: tuple[int, int, int],
    *,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Latency]:
    """Time files against each other in ONNX Runtime on the CPU.

    Args:
        candidates: By name.
        input_size: (C, H, W); the pixels are random.
        batches: Batch sizes.
        rounds: Rounds whose median is taken, after two that warm up.
        threads: Threads per operator.
        progress: Called with rounds done and to do.

    Raises:
        InputError: ONNX Runtime refuses a file.
    """
    sessions = {
        name: open_session(c.path, threads=threads, options=c.options) for name, c in candidates.items()
    }
    generator = np.random.default_rng(0)
    times: dict[str, dict[int, float]] = {name: {} for name in candidates}
    total = len(batches) * (rounds + _WARM_UP)
    for index, batch in enumerate(batches):
        images = generator.standard_normal((batch, *input_size), dtype=np.float32)
        taken: dict[str, list[float]] = {name: [] for name in candidates}
        for done in range(rounds + _WARM_UP):
            for name, session in sessions.items():
                feeds = {session.get_inputs()[0].name: images}
                started = time.perf_counter()
                session.run(None, feeds)
                taken[name].append(time.perf_counter() - started)
            if progress is not None:
                progress(index * (rounds + _WARM_UP) + done + 1, total)
        for name, seconds in taken.items():
            times[name][batch] = 1e3 * statistics.median(seconds[_WARM_UP:])
    return {name: Latency(c.path.stat().st_size, times[name]) for name, c in candidates.items()}


def export_float(module: nn.Module, input_size: tuple[int, int, int], path: Path) -> None:
    """Write the float network as an ONNX file, as the yardstick.

    Raises:
        GraphError: The network cannot be exported.
    """
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        with _without_warnings(), torch.no_grad():
            torch.onnx.export(
                module,
                (torch.zeros(2, *input_size),),
                path,
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; all mean "cannot be written as ONNX"
        summary = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GraphError(f"the float network cannot be written as ONNX: {summary}") from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
