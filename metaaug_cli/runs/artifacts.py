"""The run directory: what a quantization run leaves behind, and what resuming it checks.

``run.json`` (model, hashes, environment, status), ``recipe.yaml`` (resolved), ``float.pt2`` (the float
network as captured), ``blocks/NNN-NAME.safetensors`` with ``.json`` (learned state and loss curve, written
as each block finishes), ``augmentation/`` (see ``augmentation_files.py``), ``metrics.json``, ``log.txt``.
Every write replaces the file in one step.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.export import ExportedProgram

from metaaug_cli.errors import InputError, RecipeError, UsageError
from metaaug_cli.files import DISK_FULL, exclusive, write_atomically
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.reconstruct import BlockHistory
from metaaug_cli.recipe.config import Recipe, load_recipe
from metaaug_cli.runs.environment import environment
from metaaug_cli.runs.run_info import Fingerprint, RunInfo, changes_of_inputs, changes_of_machine

SCHEMA_VERSION = 1
RUN_FILE, RECIPE_FILE, FLOAT_FILE, METRICS_FILE, LOG_FILE, ONNX_FILE = (
    "run.json",
    "recipe.yaml",
    "float.pt2",
    "metrics.json",
    "log.txt",
    "model.onnx",
)
AUGMENTATION = "augmentation"
_OWN_NAMES = {AUGMENTATION, RUN_FILE, RECIPE_FILE, FLOAT_FILE, METRICS_FILE, LOG_FILE, ONNX_FILE, "blocks"}
_RUN_KEYS = {
    "status": str,
    "model": str,
    "preprocessing": dict,
    "num_outputs": int,
    "fingerprint": dict,
    "blocks": list,
}
REPAIR = "repair the run with the same `metaaug quantize` command and --resume"
_MARK = "run"
_logger = logging.getLogger(__name__)


def _warn_of_changes(before: dict[str, Any], info: RunInfo) -> None:
    changed = changes_of_machine(before, info.device)
    if changed:
        _logger.warning(
            "the run was begun with other software or another machine (%s): blocks learned from now on may "
            "differ from those of an uninterrupted run",
            ", ".join(changed),
        )


class RunDirectory:
    """Writes one run's files; reading a finished run is ``finished.load_run``.

    Args:
        path: The directory; made on ``start``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def mark(self) -> str:
        """What the run's block files carry, so that another run's is noticed: a hash of what decides them."""
        decides = json.dumps(read_info(self.path)["fingerprint"], sort_keys=True)
        return hashlib.sha256(decides.encode()).hexdigest()[:16]

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here; one that failed before its first block leaves only a log."""
        return (self.path / RUN_FILE).exists()

    @property
    def finished_blocks(self) -> int:
        """How many blocks are done and kept."""
        return len(list(self.path.glob("blocks/*.json")))

    def require_utf8(self) -> None:
        """Fail early where no block file could be read back.

        Raises:
            UsageError: safetensors could not open files below such a path.
        """
        try:
            str(self.path).encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(
                f"the run directory {self.path} is not valid UTF-8", hint="choose another --out"
            ) from None

    def require_free(self, *, resume: bool) -> None:
        """Fail early where a run could not be written, or would land among files that are not its own.

        Raises:
            UsageError: The directory holds a run and ``resume`` is off, or it holds something else.
        """
        other = "choose another --out"
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file", hint=other)
        if self.holds_run:
            if not resume:
                raise UsageError(
                    f"{self.path} already holds a run", hint=f"continue it with --resume, or {other}"
                )
            return
        found = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        if list(self.path.glob("blocks/*.safetensors")):
            raise UsageError(
                f"{self.path} holds blocks of a run whose {RUN_FILE} is lost",
                hint=f"restore {RUN_FILE} from a copy, or {other}",
            )
        foreign = sorted(name for name in found if name not in _OWN_NAMES and not name.startswith("."))
        if foreign:
            raise UsageError(f"--out {self.path} holds other files: {', '.join(foreign[:3])}", hint=other)

    @contextmanager
    def claim(self, *, resume: bool) -> Iterator[None]:
        """Keep other processes from writing a run here, as far as the file system has locks.

        Raises:
            UsageError: Another one is writing a run here, or as for :meth:`require_free`.
            OSError: The directory cannot be written.
        """
        self.require_free(resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path / LOG_FILE) as held:
            if not held:
                raise UsageError(
                    f"another run is being written into {self.path}",
                    hint="wait until it has ended, or choose another --out",
                )
            self.require_free(resume=resume)  # what held it may have ended a moment ago
            yield

    def start(self, info: RunInfo, recipe: Recipe, program: ExportedProgram | None, *, resume: bool) -> int:
        """Begin or resume; returns how many blocks are already done.

        Raises:
            UsageError: The directory holds a run and ``resume`` is off, or it holds something else.
            RecipeError: What is resumed is not the same run.
            InputError: The directory cannot be written.
            OSError: The disk is full.
        """
        self.require_free(resume=resume)
        done = 0
        if self.holds_run:
            before = read_info(self.path)
            self._require_same(before, info, recipe)
            done = self._done(info.blocks)
            _warn_of_changes(before, info)
        try:
            (self.path / "blocks").mkdir(parents=True, exist_ok=True)
            if (self.path / AUGMENTATION).exists():
                (self.path / AUGMENTATION).mkdir(exist_ok=True)  # a file of that name is noticed now
            self._forget(info.blocks, done)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise InputError(
                f"cannot write {error.filename or self.path}: {error.strerror}",
                hint="choose a writable --out, without files or folders that stand in the way",
            ) from None
        write_atomically(self.path / RECIPE_FILE, recipe.dump())
        if program is not None:
            write_atomically(self.path / FLOAT_FILE, program_bytes(program))
        self._write_info(info, "running")
        return done

    def _require_same(self, before: dict[str, Any], now: RunInfo, recipe: Recipe) -> None:
        changed = changes_of_inputs(before, now, self._changes_of(recipe))
        if changed:
            raise RecipeError(
                f"cannot resume {self.path}: {' and '.join(changed)} changed since it was started",
                hint="use the same recipe, model and images, or start afresh with another --out",
            )

    def _changes_of(self, recipe: Recipe) -> list[str]:
        """The settings that are not as the run was begun with, as far as its own file can say."""
        try:
            return recipe.changes_since(load_recipe(self.path / RECIPE_FILE))
        except RecipeError:
            return []

    def _done(self, names: list[str]) -> int:
        for index, name in enumerate(names):
            if not (self.block_path(index, name, ".json").exists() and self.block_path(index, name).exists()):
                return index
            try:
                self._block_state(index, name)
                history = _read_history(self.block_path(index, name, ".json"))
                if history.augmentation:  # the augmenter goes on from where this block left it
                    read_state(self.path / AUGMENTATION / self.block_path(index, name).name)
            except InputError as error:
                _logger.warning("%s; learning goes on from this block", error.message)
                return index
        return len(names)

    def _forget(self, names: list[str], done: int) -> None:
        """Remove what follows the finished blocks: it was learned on other ones where a run is repaired."""
        for index, name in list(enumerate(names))[done:]:
            for suffix in (".json", ".safetensors"):  # the mark that a block is done goes first
                self.block_path(index, name, suffix).unlink(missing_ok=True)

    def block_path(self, index: int, name: str, suffix: str = ".safetensors") -> Path:
        """File of one block's state (``.safetensors``) or history (``.json``)."""
        return self.path / "blocks" / f"{index:03d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}{suffix}"

    def save_block(self, block: Block, history: BlockHistory) -> None:
        """Write one finished block: its state first, then the history that marks it as done."""
        marked = save(block.state(), metadata={_MARK: self.mark})
        write_atomically(self.block_path(block.index, block.name), marked)
        write_atomically(self.block_path(block.index, block.name, ".json"), json.dumps(asdict(history)))

    def load_block(self, block: Block) -> BlockHistory:
        """Load one finished block into its quantizers and return its history."""
        path = self.block_path(block.index, block.name)
        try:
            block.load(self._block_state(block.index, block.name))
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"{path} does not hold block {block.name}: {error}",
                hint="delete it and continue with --resume: its block is then learned again",
            ) from None
        return _read_history(self.block_path(block.index, block.name, ".json"))

    def _block_state(self, index: int, name: str) -> dict[str, Tensor]:
        path = self.block_path(index, name)
        state = read_state(path)
        with safe_open(path, "pt") as stored:
            mark = (stored.metadata() or {}).get(_MARK, self.mark)  # older runs have none
        if mark != self.mark:
            raise InputError(f"{path} belongs to another run", hint=REPAIR)
        return state

    def finish(self, info: RunInfo, metrics: dict[str, Any]) -> None:
        """Write the metrics and mark the run as complete."""
        write_atomically(self.path / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
        (self.path / ONNX_FILE).unlink(missing_ok=True)  # of an earlier state; made again when asked for
        self._write_info(info, "complete")

    def _write_info(self, info: RunInfo, status: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"schema_version": SCHEMA_VERSION, "status": status, "written": now, **asdict(info)}
        content["environment"] = environment()
        write_atomically(self.path / RUN_FILE, json.dumps(content, indent=2) + "\n")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file of a run.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}", hint=REPAIR) from None


def _read_history(path: Path) -> BlockHistory:
    try:
        return BlockHistory(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}", hint=REPAIR) from None


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """The content of ``metrics.json``; empty, with a warning, where it cannot be read."""
    path = run_dir / METRICS_FILE
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        _logger.warning("cannot read %s: %s", path, error)
        return {}
    return metrics if isinstance(metrics, dict) else {}


def program_bytes(program: ExportedProgram) -> bytes:
    """A program as the content of a ``.pt2`` file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def read_info(run_dir: Path) -> dict[str, Any]:
    """The content of ``run.json``.

    Raises:
        InputError: It is not a run directory, or a later version's.
    """
    path = run_dir / RUN_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{run_dir} is not a run directory ({RUN_FILE}: {error.strerror})",
            hint="give the --out directory of `metaaug quantize`",
        ) from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is damaged: it is not JSON",
            hint="restore it from a copy, or start afresh with another --out",
        ) from None
    if not isinstance(info, dict) or "schema_version" not in info:
        raise InputError(f"{path} is not a run's", hint="start afresh with another --out")
    if info["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {info['schema_version']}, this metaaug reads {SCHEMA_VERSION}",
            hint="use the release of metaaug that wrote the run",
        )
    wrong = sorted(key for key, kind in _RUN_KEYS.items() if not isinstance(info.get(key), kind))
    if "fingerprint" not in wrong and not {f.name for f in fields(Fingerprint)} <= set(info["fingerprint"]):
        wrong = sorted({*wrong, "fingerprint"})
    if wrong:
        raise InputError(
            f"{path} is damaged: {', '.join(wrong)} missing or of another kind",
            hint="restore it from a copy, or start afresh with another --out",
        )
    return info
