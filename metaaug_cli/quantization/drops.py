"""QDrop's random choice of the elements that are quantized while a block learns (Wei et al., ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaaug_cli.layout import Layout

_BYTE = 256


@dataclass(frozen=True)
class Drops:
    """Which elements of a tensor are quantized: those whose random byte is below a threshold.

    Args:
        drawn: Uniform bytes (uint8, flat), one for each element in the tensor's memory order.
        threshold: 0 to 255.
    """

    drawn: Tensor
    threshold: int

    @classmethod
    def draw(cls, like: Tensor, prob: float, generator: torch.Generator | None) -> Drops | None:
        """Choose each element of ``like`` with probability ``prob`` (in steps of 1/256).

        Args:
            like: Any shape and layout.
            prob: 0 to 1.
            generator: On the device of ``like``.

        Returns:
            None where all elements are chosen.
        """
        threshold = round(prob * _BYTE)
        if threshold == _BYTE:  # not a byte: the comparison would wrap it to 0
            return None
        words = -(-like.numel() // 8)  # eight draws a word: the cheapest source
        bits = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator, device=like.device)
        return cls(bits.view(torch.uint8)[: like.numel()], threshold)

    def quantized(self, piece: slice, like: Tensor) -> Tensor:
        """1 where an element is quantized, else 0; ``like`` has the type and the piece's length."""
        return torch.lt(self.drawn[piece], self.threshold, out=torch.empty_like(like))

    def kept(self, piece: slice, like: Tensor) -> Tensor:
        """The opposite of ``quantized``."""
        return torch.ge(self.drawn[piece], self.threshold, out=torch.empty_like(like))


def drop_mask(like: Tensor, prob: float, generator: torch.Generator | None) -> Tensor:
    """A float mask with the shape and layout of ``like``: 1 with probability ``prob``, else 0."""
    drops = Drops.draw(like, prob, generator)
    if drops is None:
        return torch.ones_like(like)
    everything = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    return Layout.of(like).shaped(drops.quantized(slice(None), everything))
