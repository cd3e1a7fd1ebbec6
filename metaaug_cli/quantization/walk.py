"""The images' way through the chain: originals, augmented copies and held-back images, block by block."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from metaaug_cli.layout import fast_layout
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import (
    BlockData,
    Budget,
    Parts,
    Rows,
    Stored,
    Stream,
    place_for,
    stage_bytes,
)

_logger = logging.getLogger(__name__)


class Lane:
    """The full-precision and the quantized stream of the same images.

    Args:
        images: (N, C, H, W) on the CPU.
        device: Where batches are delivered.
    """

    def __init__(self, images: Rows, device: torch.device) -> None:
        self.float_stream = Stream((images,), device)
        self.quantized_stream = Stream((images,), device)
        self.targets: Stored | None = None

    def __len__(self) -> int:
        return len(self.float_stream)

    def enter(self, block: Block, place: torch.device | None) -> None:
        """Bring both streams to the block's input and, where there is room, compute its targets once."""
        self.float_stream.keep(place)
        self.quantized_stream.keep(place)
        self.targets = None
        if place is not None:
            after = Stream(self.float_stream.stored, self.float_stream.device)
            after.pending = [block.float_block]
            self.targets = after.compute(place)

    def leave(self, block: Block, place: torch.device | None) -> None:
        """Move both streams past the block."""
        if self.targets is not None:
            self.float_stream.replace(self.targets)
        else:
            self.float_stream.advance(block.float_block, place=None)
        self.quantized_stream.advance(block.quantized_block, place=place)

    def pass_by(self, block: Block) -> None:
        """Move past a block whose inputs nobody asks for."""
        self.float_stream.pending.append(block.float_block)
        self.quantized_stream.pending.append(block.quantized_block)

    def data(self, block: Block, originals: int) -> BlockData:
        """What ``block`` learns from these images, the first ``originals`` of which are not copies."""
        return BlockData(
            self.float_stream,
            self.quantized_stream,
            block.float_block,
            self.targets,
            block.computed,
            originals,
        )

    def joined(self, other: Lane) -> Lane:
        """Both lanes' images as one, each part where it lies; both store the same block's inputs."""
        lane = Lane(self.float_stream.stored[0], self.float_stream.device)
        pairs = (
            (lane.float_stream, self.float_stream, other.float_stream),
            (lane.quantized_stream, self.quantized_stream, other.quantized_stream),
        )
        for stream, first, second in pairs:
            stream.stored = _in_parts(first.stored, second.stored)
        if self.targets is not None and other.targets is not None:
            lane.targets = _in_parts(self.targets, other.targets)
        return lane


def _in_parts(first: Stored, second: Stored) -> Stored:
    return tuple(Parts(a, b) for a, b in zip(first, second, strict=True))


class Walker:
    """Carries the lanes from block to block, within the memory budget.

    Args:
        images: (N, C, H, W); originals, then copies that walk along with them.
        originals: How many of ``images`` are originals.
        held_back: Images (M, C, H, W) that nothing is learned from.
        device: Where batches are delivered.
        budget: Bytes of activations to keep.
    """

    def __init__(
        self, images: Tensor, originals: int, held_back: Tensor, device: torch.device, budget: Budget
    ) -> None:
        self.images, self.originals, self.budget, self.device = images, originals, budget, device
        self.main = self._lane(images)
        self.held_back = self._lane(held_back) if len(held_back) else None
        self.place: torch.device | None = None
        self.passed: list[Block] = []

    def enter(self, block: Block, *, learns: bool) -> BlockData:
        """Bring the images to the block's input."""
        self.place = self._place(block, len(self.main), learns=learns)
        self.main.enter(block, self.place)
        if self.held_back is not None:
            self.held_back.enter(block, self.place)
        return self.main.data(block, self.originals)

    def with_copies(self, block: Block, copies: Tensor) -> BlockData:
        """The entered block's data with copies (K, C, H, W) added, which walk the blocks before it now."""
        place = self._place(block, len(self.main) + len(copies), learns=True)
        if place is None or self.place is None:
            lane = self._lane(torch.cat([self.images, copies]))
            self._catch_up(lane)
            return lane.data(block, self.originals)
        lane = self._lane(copies)
        self._catch_up(lane)
        lane.enter(block, place)
        return self.main.joined(lane).data(block, self.originals)

    def held_back_data(self, block: Block) -> BlockData | None:
        """The entered block's data of the held-back images, if there are any."""
        return self.held_back.data(block, len(self.held_back)) if self.held_back is not None else None

    def leave(self, block: Block) -> None:
        """Move the images past the block."""
        self.main.leave(block, self.place)
        if self.held_back is not None:
            self.held_back.leave(block, self.place)
        self.passed.append(block)

    def _lane(self, images: Tensor) -> Lane:
        return Lane(fast_layout(images) if self.device.type == "cpu" else images, self.device)

    def _catch_up(self, lane: Lane) -> None:
        for block in self.passed:
            lane.pass_by(block)

    def _place(self, block: Block, images: int, *, learns: bool) -> torch.device | None:
        images += len(self.held_back) if self.held_back is not None else 0
        place = place_for(stage_bytes(block.stage, images), self.budget)
        if place is None and learns:
            _logger.warning(
                "block %s: activations exceed the cache budget and are recomputed each step", block.name
            )
        return place
