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


def changes_of_inputs(before: dict[str, Any], now: RunInfo, settings: list[str]) -> list[str]:
    """What the user gives now but did not ``before`` (of ``run.json``).

    ``settings`` are those of the recipe that differ.
    """
    prepared = [
        key for key, value in now.preprocessing.items() if _other(value, before["preprocessing"].get(key))
    ]
    meaning = {
        "recipe": f"the recipe{_listed(settings)}",
        "weights": "the model's weights",
        "graph": "the model's code",
        # the hash is of prepared images: where their preparation differs, the images need not
        "calibration": f"how images are prepared{_listed(prepared)}" if prepared else "the calibration set",
    }
    then = before["fingerprint"]
    return [meaning[key] for key, value in asdict(now.fingerprint).items() if then.get(key) != value]


def _other(value: Any, before: Any) -> bool:
    return (list(value) if isinstance(value, tuple) else value) != before


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def changes_of_machine(before: dict[str, Any], device: str) -> list[str]:
    """What of software and machine is not as ``before`` (of ``run.json``) says, as "torch 2.8 -> 2.9"."""
    then = {**before.get("environment", {}), "device": before.get("device")}
    now = {**environment(), "device": device}
    keys = [key for key in (*_DECIDES_BITS, "device") if then.get(key) != now.get(key)]
    return [f"{key} {then.get(key, 'unknown')} -> {now.get(key, 'none')}" for key in keys]
