"""MetaAug's two kinds of step done the obvious way, for the benchmarks to compare with.

What the method says, each time anew: both networks run from the images to the logits to reach one block (or
stop at it), the whole quantized network's state is copied for the inner step, nothing about the original
images is kept, every quantizer is its formula in PyTorch operators, activations lie in PyTorch's usual order,
and on a GPU every kernel is launched by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
from common import plain_operators
from torch import Tensor

from metaaug_cli.augmentation import bilevel
from metaaug_cli.augmentation import passes as passes_module
from metaaug_cli.augmentation.augmenter import moved
from metaaug_cli.augmentation.bilevel import BiLevel
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
        stack.enter_context(patch.object(bilevel, "_undropped", _undropped))
        stack.enter_context(patch.object(reconstruct, "_loss", reconstruction_loss))
        stack.enter_context(patch.object(GraphedStep, "__call__", lambda self, inputs: self.step(inputs)))
        yield


@contextmanager
def _undropped(block: Block) -> Iterator[None]:
    """No dropping, still by the plain formulas."""
    kept = [(act, act.quant_prob) for act in block.activations.values()]
    for act, _ in kept:
        act.quant_prob = 1.0
    try:
        yield
    finally:
        for act, quant_prob in kept:
            act.quant_prob = quant_prob


class ObviousPasses(Passes):
    """Passes that reach a block on the way of a whole one.

    Args:
        blocks: All blocks of the chain, in order.
        stops: End the quantized half, and what learning reads of the float one, at the block.
    """

    def __init__(self, blocks: list[Block], *, stops: bool) -> None:
        super().__init__(blocks)
        self.stops = stops

    def prefixes(self, images: Tensor, before: int) -> tuple[Values, Values]:
        """As in ``Passes``, caught on the way of a whole pass."""
        h_fp, h_q = super().prefixes(images, before)
        self.finish(h_q, before)
        return h_fp, h_q

    def finish(self, values: Values, start: int) -> None:
        """The quantized network from block ``start`` on, dropping nothing: the draws stay as ours are."""
        if self.stops:
            return
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
    def float_ends(self, images: Tensor, of: int) -> tuple[Values, Values]:
        """Full-precision inputs and outputs of block ``of``, caught on the way of a whole pass."""
        values: Values = (passes_module.fast_layout(images),)  # type: ignore[attr-defined]
        passed = [values]
        for block in self.blocks[: of + 1] if self.stops else self.blocks:
            values = block.float_block(*values)
            passed.append(values)
        return passed[of], passed[of + 1]


class ObviousLearner(MetaLearner):
    """Outer steps on the same draws, with nothing kept from step to step; ``passes`` are obvious ones."""

    passes: ObviousPasses

    @contextmanager
    def _steps(self, level: BiLevel, drops: torch.Generator) -> Iterator[tuple[Step, Step]]:
        del drops  # nothing is recorded
        step = partial(self._step_on_a_copy, level)
        yield step, step

    def _step_on_a_copy(self, level: BiLevel, inputs: Sequence[Tensor]) -> Tensor:
        states = [block.quantized_block.state_dict() for block in self.passes.blocks]
        copied = [value.detach().clone() for state in states for value in state.values()]
        values = self._step(level, inputs, measure=False)
        del copied  # held as long as the step lasts
        return values

    def _inputs(self, data: BlockData, generator: torch.Generator) -> list[Tensor]:
        """The draws of ``MetaLearner``; what it has kept is computed."""
        assert isinstance(data, ObviousData)
        chosen = _draw(len(self.images), self.schedule.batch_size, generator)
        validation = _draw(len(self.images), self.schedule.val_batch_size, generator)
        draws = moved(self.augmenter.draw(len(chosen), generator), self.device)
        x, x_val = (self.images[indices].to(self.device) for indices in (chosen, validation))
        views, val_views = (self.passes.views(images, self.device) for images in (x, x_val))
        h_val = self.passes.quantized_prefix(x_val, data.index)
        return [x, views.features, views.logits, val_views.features, val_views.logits, *draws, *h_val]


class ObviousData(BlockData):
    """What ``block`` learns from, of which only the images (N, C, H, W) are kept."""

    def __init__(self, passes: ObviousPasses, block: Block, images: Tensor) -> None:
        stream = Stream((images,), images.device)
        super().__init__(stream, stream, block.float_block, None, block.computed)
        self.passes, self.index = passes, block.index

    def batch(self, indices: Tensor) -> tuple[Values, Values, Values]:
        """Both inputs and the targets of some images, walked to."""
        (images,) = self.float_stream.batch(indices)
        h_fp, outputs = self.passes.float_ends(images, self.index)
        h_q = self.passes.quantized_prefix(images, self.index)
        return h_fp, h_q, tuple(outputs[i] for i in self.computed)
