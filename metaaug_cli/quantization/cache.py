"""Activations at the current cut, within a byte budget.

Two streams walk the chain side by side: the full-precision one and the quantized one. What a block needs
of them (its two inputs and its target) is kept on the device, else in host memory, and where neither has
room it is recomputed from the last point that was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaaug_cli.graph.stages import Stage, value_bytes
from metaaug_cli.layout import Layout
from metaaug_cli.memory import free_memory_bytes

_CHUNK = 64
_DEFAULT_SHARE = 0.5

Values = tuple[Tensor, ...]
Step = Callable[..., Values]


@dataclass(frozen=True)
class Parts:
    """Some rows and behind them others, each where it lies: joined without a copy.

    Args:
        first: (N, …).
        second: (M, …), perhaps on another device.
    """

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)


Rows = Tensor | Parts
Stored = tuple[Rows, ...]


@dataclass(frozen=True)
class Budget:
    """How many bytes of activations may be kept, per place."""

    device: torch.device
    device_bytes: int
    host_bytes: int


def default_budget(device: torch.device, cache_gb: float | None) -> Budget:
    """Half of the free memory of the device and of the host, or ``cache_gb`` GiB for both together."""
    host = free_memory_bytes()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if cache_gb is None:
            return Budget(device, int(free * _DEFAULT_SHARE), int(host * _DEFAULT_SHARE))
        total = int(cache_gb * 2**30)
        on_device = min(total, int(free * _DEFAULT_SHARE))
        return Budget(device, on_device, total - on_device)
    total = int(host * _DEFAULT_SHARE) if cache_gb is None else int(cache_gb * 2**30)
    return Budget(device, total, 0)


def stage_bytes(stage: Stage, images: int) -> int:
    """Bytes that a block takes at once for ``images`` images.

    That is both inputs and the target while it learns, and the quantized input and both outputs when the
    images leave it.
    """
    inputs = sum(map(value_bytes, stage.inputs))
    outputs = sum(map(value_bytes, stage.outputs))
    return images * max(2 * inputs + outputs, inputs + 2 * outputs)


class Stream:
    """One stream's values at the current cut: stored, or the steps that lead there from what is stored.

    Args:
        values: (N, …) at the start of the chain.
        device: Where batches are delivered.
    """

    def __init__(self, values: Stored, device: torch.device) -> None:
        self.stored, self.device = values, device
        self.pending: list[Step] = []

    def __len__(self) -> int:
        return len(self.stored[0])

    @torch.no_grad()
    def batch(self, indices: Tensor) -> Values:
        """The values of some images on the device; ``indices`` is a 1-d integer tensor on the CPU."""
        values = tuple(_take(rows, indices, self.device) for rows in self.stored)
        for step in self.pending:
            values = step(*values)
        return values

    def keep(self, place: torch.device | None) -> None:
        """Store the values at the current cut on ``place``; None leaves them to be recomputed."""
        if place is None:
            return
        elsewhere = any(isinstance(rows, Tensor) and rows.device.type != place.type for rows in self.stored)
        if self.pending or elsewhere:
            self.replace(self.compute(place))

    def replace(self, values: Stored) -> None:
        """Take ``values`` (N, …) as the stored values at the current cut."""
        self.stored, self.pending = values, []

    def advance(self, step: Step, *, place: torch.device | None) -> None:
        """Move past one block; ``place`` is where its outputs are kept, None to recompute them when asked."""
        self.pending.append(step)
        self.keep(place)

    def compute(self, place: torch.device) -> Values:
        """The values of every image at the current cut, stored on ``place``."""
        kept: list[Tensor] = []
        for start in range(0, len(self), _CHUNK):
            indices = torch.arange(start, min(start + _CHUNK, len(self)))
            for number, value in enumerate(self.batch(indices)):
                if start == 0:
                    kept.append(_room(value, len(self), place))
                kept[number][start : start + len(value)] = value
        return tuple(kept)


def _room(first: Tensor, count: int, place: torch.device) -> Tensor:
    """Room on ``place`` for ``count`` rows like those of ``first``, in its layout."""
    layout = replace(Layout.of(first), shape=torch.Size((count, *first.shape[1:])))
    return layout.shaped(torch.empty(layout.shape.numel(), dtype=first.dtype, device=place))


def _take(rows: Rows, indices: Tensor, device: torch.device) -> Tensor:
    """Some of the rows, on ``device``; ``indices`` on the CPU."""
    if isinstance(rows, Tensor):
        if rows.device.type == device.type:
            return _select(rows, indices.to(device, non_blocking=True))
        return _select(rows, indices, pinned=device.type == "cuda").to(device, non_blocking=True)
    behind = indices >= len(rows.first)
    first = _take(rows.first, indices[~behind], device)
    second = _take(rows.second, indices[behind] - len(rows.first), device)
    places = (
        behind.long().argsort(stable=True).argsort()
    )  # where each row asked for lies in the two behind each other
    return _select(torch.cat([first, second]), places.to(device, non_blocking=True))


def _select(rows: Tensor, indices: Tensor, *, pinned: bool = False) -> Tensor:
    """Some of the rows, in their layout, which torch would give up; ``pinned`` ones go to a GPU unwaited."""
    if Layout.of(rows).channels_last:
        return _select(rows.permute(0, 2, 3, 1), indices, pinned=pinned).permute(0, 3, 1, 2)
    if not pinned:
        return rows.index_select(0, indices)
    chosen = torch.empty((len(indices), *rows.shape[1:]), dtype=rows.dtype, pin_memory=True)
    return torch.index_select(rows, 0, indices, out=chosen)


def place_for(needed: int, budget: Budget) -> torch.device | None:
    """Where ``needed`` bytes of activations are kept: the device, the host, or nowhere."""
    if needed <= budget.device_bytes:
        return budget.device
    if needed <= budget.host_bytes:
        return torch.device("cpu")
    return None


@dataclass
class BlockData:
    """What one block learns from: both input streams and the full-precision block."""

    float_stream: Stream
    quantized_stream: Stream
    float_block: Step
    targets: Stored | None
    computed: Sequence[int]
    originals: int | None = None

    def __len__(self) -> int:
        """How many calibration images there are; augmented copies come after them."""
        return len(self.float_stream) if self.originals is None else self.originals

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of one batch: all originals, or half originals and half copies where there are copies."""
        copies = len(self.float_stream) - len(self)
        if copies == 0:
            return torch.randint(len(self), (count,), generator=generator)
        from_copies = count // 2
        if count % 2:
            from_copies += int(torch.randint(2, (), generator=generator))
        return torch.cat(
            [
                torch.randint(len(self), (count - from_copies,), generator=generator),
                torch.randint(copies, (from_copies,), generator=generator) + len(self),
            ]
        )

    @torch.no_grad()
    def batch(self, indices: Tensor) -> tuple[Values, Values, Values]:
        """(full-precision inputs, quantized inputs, targets) of some images, as ``computed`` lists them."""
        h_fp = self.float_stream.batch(indices)
        h_q = self.quantized_stream.batch(indices)
        if self.targets is None:
            outputs = self.float_block(*h_fp)
            return h_fp, h_q, tuple(outputs[i] for i in self.computed)
        device = self.float_stream.device
        return h_fp, h_q, tuple(_take(self.targets[i], indices, device) for i in self.computed)
