"""The file that an interrupted synthesis continues from."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.files import replaced_atomically

_logger = logging.getLogger(__name__)
_FORMAT = "metaaug-synthesis"
_LEAST_SECONDS = 10.0
_SHARE = 20


class StateFile:
    """Keeps the state of a synthesis now and then, so that a killed one loses seconds.

    Args:
        path: The file.
        fingerprint: Everything that decides the result, as JSON types; a state of another one is refused.
        required: Whether a state that cannot be written is an error; else the synthesis goes on without.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], *, required: bool = True) -> None:
        self.path, self.fingerprint, self.required = path, fingerprint, required
        self.due = time.monotonic() + _LEAST_SECONDS

    def save_if_due(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """``save`` where enough time has passed that saving costs at most a twentieth of it."""
        if time.monotonic() >= self.due:
            self.save(tensors, scalars)

    def save(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Replace the file in one step.

        Raises:
            InputError: It cannot be written.
            OSError: The disk is full.
        """
        started = time.monotonic()
        content = json.dumps({"format": _FORMAT, "fingerprint": self.fingerprint, "scalars": scalars})
        try:
            with replaced_atomically(self.path) as partial:
                save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, {"state": content})
        except (OSError, InputError) as exc:
            if self.required:
                raise
            _logger.warning("an interrupted synthesis will not go on: %s", exc)
            self.due = math.inf
            return
        now = time.monotonic()
        self.due = now + max(_LEAST_SECONDS, _SHARE * (now - started))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save`` wrote.

        Raises:
            InputError: The file is not there or not readable.
            UsageError: It belongs to another model or other settings.
        """
        if not self.path.exists():
            raise InputError(f"there is no {self.path} to resume", hint="leave --resume out to start")
        try:
            with safe_open(self.path, framework="pt") as file:
                content = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            stored, scalars = content["fingerprint"], content["scalars"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as exc:
            raise InputError(
                f"{self.path} is not a readable state: {exc}", hint="delete it and start again"
            ) from exc
        wanted = json.loads(json.dumps(self.fingerprint))
        if stored != wanted:
            changed = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
            raise UsageError(
                f"{self.path} was begun with another {', '.join(changed)}",
                hint="give the model and the flags it was begun with, or delete it and leave --resume out",
            )
        return tensors, scalars


def require_absent(path: Path) -> None:
    """Refuse to overwrite an unfinished state.

    Raises:
        UsageError: There is one.
    """
    if path.exists():
        raise UsageError(
            f"{path} holds an unfinished synthesis",
            hint="continue it with --resume, or delete it to start again",
        )
