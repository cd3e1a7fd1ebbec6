"""MetaAug's two kinds of step done the obvious way, for the benchmarks to compare with.

What the method says, each time anew: both networks run from the images to the logits to reach one block, the
whole quantized network's state is copied for the inner step, nothing about the original images is kept, every
quantizer is its formula in PyTorch operators, activations lie in PyTorch's usual order, and on a GPU every
kernel is launched by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
from common import plain_operators
from torch import Tensor

from metaaug_cli.augmentation import passes as passes_module
from metaaug_cli.augmentation.augmenter import moved
from metaaug_cli.augmentation.bilevel import BiLevel, _undropped
from metaaug_cli.augmentation.meta import MetaLearner, _draw
from metaaug_cli.augmentation.passes import Passes
from metaaug_cli.quantization import reconstruct
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData, Stream, Values
from metaaug_cli.quantization.graphed import GraphedStep, Step
from metaaug_cli.quantization.losses import reconstruction_loss

Layout = Callable[[Tensor], Tensor]


@contextmanager
def obvious_way(blocks: list[Block], layout: Layout = lambda x: x) -> Iterator[None]:
    """Plain formulas in the order of memory that ``layout`` gives, launched one by one."""
    with ExitStack() as stack:
        stack.enter_context(plain_operators(blocks))
        stack.enter_context(patch.object(passes_module, "fast_layout", layout))
        stack.enter_context(patch.object(reconstruct, "_loss", reconstruction_loss))
        stack.enter_context(patch.object(GraphedStep, "__call__", lambda self, inputs: self.step(inputs)))
        yield


class ObviousPasses(Passes):
    """Passes whose quantized half always runs to the logits; the float rest does so anyway."""

    def prefixes(self, images: Tensor, before: int) -> tuple[Values, Values]:
        """As in ``Passes``, caught on the way of a whole pass."""
        h_fp, h_q = super().prefixes(images, before)
        self.finish(h_q, before)
        return h_fp, h_q

    def finish(self, values: Values, start: int) -> None:
        """The quantized network from block ``start`` on, dropping nothing: the draws stay as ours are."""
        with _undropped(self.blocks[start]):
            for block in self.blocks[start:]:
                values = block.quantized_block(*values)

    @torch.no_grad()
    def quantized_prefix(self, images: Tensor, before: int) -> Values:
        """Quantized inputs of block ``before``, caught on the way of a whole pass."""
        values: Values = (passes_module.fast_layout(images),)  # type: ignore[attr-defined]
        for block in self.blocks[:before]:
            values = block.quantized_block(*values)
        self.finish(values, before)
        return values

    @torch.no_grad()
    def float_prefix(self, images: Tensor, before: int) -> Values:
        """Full-precision inputs of block ``before``, caught on the way of a whole pass."""
        caught: Values = (passes_module.fast_layout(images),)  # type: ignore[attr-defined]
        values = caught
        for block in self.blocks:
            caught = values if block.index == before else caught
            values = block.float_block(*values)
        return caught


class ObviousLearner(MetaLearner):
    """Outer steps on the same draws, with nothing kept from step to step."""

    passes: ObviousPasses
    at = 0

    @contextmanager
    def _steps(self, bilevel: BiLevel, drops: torch.Generator) -> Iterator[tuple[Step, Step]]:
        del drops
        self.at = bilevel.block.index
        step = partial(self._copied, bilevel)
        yield step, step

    def _copied(self, bilevel: BiLevel, inputs: Sequence[Tensor]) -> Tensor:
        blocks = self.passes.blocks
        copied = [t.detach().clone() for b in blocks for t in b.quantized_block.state_dict().values()]
        assert copied
        return self._step(bilevel, inputs, measure=False)

    def _inputs(self, data: BlockData, generator: torch.Generator) -> list[Tensor]:
        """The draws of ``MetaLearner``; what it has kept is computed."""
        del data
        chosen = _draw(len(self.images), self.schedule.batch_size, generator)
        validation = _draw(len(self.images), self.schedule.val_batch_size, generator)
        draws = moved(self.augmenter.draw(len(chosen), generator), self.device)
        x, x_val = (self.images[indices].to(self.device) for indices in (chosen, validation))
        views, val_views = (self.passes.views(images, self.device) for images in (x, x_val))
        h_val = self.passes.quantized_prefix(x_val, self.at)
        return [x, views.features, views.logits, val_views.features, val_views.logits, *draws, *h_val]


def obvious_data(passes: ObviousPasses, block: Block, images: Tensor) -> BlockData:
    """What ``block`` learns from, of which only the images are kept."""
    there, here = (Stream((images,), images.device) for _ in range(2))
    there.pending = [partial(passes.float_prefix, before=block.index)]
    here.pending = [partial(passes.quantized_prefix, before=block.index)]
    return BlockData(there, here, block.float_block, None, block.computed)
