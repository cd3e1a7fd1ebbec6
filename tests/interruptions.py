"""Stopping work half-way, as Ctrl-C does."""

import pytest

from metaaug_cli.synthesis.dgh import _Synthesis
from metaaug_cli.synthesis.state import StateFile


def interrupt_synthesis(patch: pytest.MonkeyPatch, *, at: int) -> None:
    """Ctrl-C before step ``at`` of a synthesis, whose state is kept at every step before it."""
    take_step = _Synthesis.take_step

    def interrupted(self: _Synthesis) -> None:
        if self.step == at:
            raise KeyboardInterrupt
        take_step(self)

    patch.setattr(_Synthesis, "take_step", interrupted)
    patch.setattr(StateFile, "save_if_due", StateFile.save)
