"""What identifies a run: hashes of all that decides its result, and what it was made with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from metaaug_cli.runs.environment import environment

_DECIDES_BITS = ("metaaug", "torch", "processor", "threads", "gpu")


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of all that the user decides; a run resumes only where all four are the same."""

    recipe: str
    weights: str
    graph: str
    calibration: str


@dataclass(frozen=True)
class RunInfo:
    """What ``run.json`` holds besides status and environment."""

    model: str
    weights: str
    preprocessing: dict[str, Any]
    num_outputs: int
    calibration: dict[str, Any]
    fingerprint: Fingerprint
    blocks: list[str]
    device: str
    command: str | None = None


def changes_of_inputs(before: dict[str, Any], now: Fingerprint, settings: list[str]) -> list[str]:
    """What the user gives now but did not ``before``; ``settings`` are those of the recipe that differ."""
    named = f" ({', '.join(settings)})" if settings else ""
    meaning = {
        "recipe": f"the recipe{named}",
        "weights": "the model's weights",
        "graph": "the model's code",
        "calibration": "the calibration set",
    }
    return [meaning[key] for key, value in asdict(now).items() if before.get(key) != value]


def changes_of_machine(before: dict[str, Any], device: str) -> list[str]:
    """What of software and machine is not as ``before`` (of ``run.json``) says, as "torch 2.8 -> 2.9"."""
    then = {**before.get("environment", {}), "device": before.get("device")}
    now = {**environment(), "device": device}
    keys = [key for key in (*_DECIDES_BITS, "device") if then.get(key) != now.get(key)]
    return [f"{key} {then.get(key, 'unknown')} -> {now.get(key, 'none')}" for key in keys]
