"""Shows a quantization run while it goes: one bar over all blocks, one line per finished block."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from metaaug_cli.cli.console import Console, ProgressCallback, format_seconds

if TYPE_CHECKING:
    from metaaug_cli.augmentation.warmup import WarmUp
    from metaaug_cli.quantization.blocks import Block
    from metaaug_cli.quantization.reconstruct import BlockHistory


class RunProgress:
    """Implements ``pipeline.Progress`` on a console.

    Args:
        console: Where the lines go.
        tick: Callback of the bar.
    """

    def __init__(self, console: Console, tick: ProgressCallback) -> None:
        self.console, self.tick = console, tick
        self.started = time.monotonic()
        self.blocks, self.steps = 0, 1

    def planned(self, blocks: int, steps_per_block: int) -> None:
        """How much there is to do."""
        self.blocks, self.steps = blocks, max(steps_per_block, 1)

    def making_images(self, done: int, total: int, text: str) -> None:
        """One step of the images' synthesis is done."""
        self.tick(done, total, f"making images, {text}" if text else "making images")

    def made_images(self, count: int) -> None:
        """The images from the network are there."""
        self.console.note(f"synthetic    {count} images from the network's batch norms")
        self.started = time.monotonic()

    def warming_up(self, done: int, total: int) -> None:
        """One step of the augmenter's warm-up is done."""
        self.tick(done, total, "warming up the augmenter")

    def warmed_up(self, warmup: WarmUp) -> None:
        """The augmenter reproduces its input, as well as this says."""
        how = "from an earlier run" if warmup.cached else f"{warmup.steps} steps"
        self.console.note(
            f"augmenter    reproduces the images up to {warmup.error:.2%} of their variance, {how}"
        )
        self.started = time.monotonic()

    def step(self, block: Block, done: int, total: int) -> None:
        """One optimizer step is done."""
        self.tick(
            block.index * total + done,
            self.blocks * total,
            f"block {block.index + 1}/{self.blocks} {block.name}",
        )

    def finished(self, block: Block, history: BlockHistory, *, resumed: bool) -> None:
        """One block is done: its losses and its time."""
        now = time.monotonic()
        how = "resumed" if resumed else format_seconds(now - self.started)
        self.started = now
        self.tick((block.index + 1) * self.steps, self.blocks * self.steps, "")
        error = f"{history.loss_after:.4g}"
        if history.loss_before != history.loss_after:
            error = f"{history.loss_before:.4g} -> {error}"
        self.console.note(f"block {block.index + 1}/{self.blocks} {block.name}: error {error}, {how}")
