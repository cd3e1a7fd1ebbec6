"""A training step on a GPU, recorded once and replayed: one launch instead of hundreds (CUDA graphs)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)
_WARM_UP = 2  # steps in which libraries choose their kernels and Adam makes its state

Step = Callable[[Sequence[Tensor]], Tensor]


@contextmanager
def recorded_steps(*steps: Step, generators: Sequence[torch.Generator]) -> Iterator[list[Step]]:
    """The steps as ``GraphedStep``s, whose recordings are given up at the end.

    Left to the garbage collector, they would go in the middle of another recording, which then fails.
    """
    graphed = [GraphedStep(step, generators) for step in steps]
    try:
        yield list(graphed)
    finally:
        for step in graphed:
            step.close()


class GraphedStep:
    """Does what ``step`` does, each time with other inputs of the same shapes.

    The first calls run it as it is, on a stream beside, the next one records it, and from then on the
    recording is replayed on copies of the inputs. Everything else that ``step`` reads has to keep its place
    in memory. Where a step cannot be recorded (it waits for the GPU, say), all go on as they are.

    Args:
        step: From a list of CUDA tensors to one.
        generators: On the GPU; all that ``step`` draws from besides the default one.
    """

    possible = True  # in this process: a recording that failed once would fail for every block

    def __init__(self, step: Step, generators: Sequence[torch.Generator] = ()) -> None:
        self.step, self.generators = step, generators
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """One step; the result is overwritten by the next."""
        self.calls += 1
        if not GraphedStep.possible:
            self.close()
        elif self.graph is None and self.calls > _WARM_UP:
            self._record(inputs)
        if self.graph is None or self.output is None:
            return self._aside(inputs)
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.output

    def _aside(self, inputs: Sequence[Tensor]) -> Tensor:
        """As it is, on the stream that the recording will use, as autograd wants it."""
        current, beside = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            result = self.step(inputs)
        current.wait_stream(beside)
        return result

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.detach().clone() for x in inputs]
        graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
        drawn_from = [*self.generators, torch.cuda.default_generators[device]]
        untouched = [generator.clone_state() for generator in drawn_from]
        for generator in self.generators:
            graph.register_generator_state(generator)
        current = torch.cuda.current_stream()
        try:
            with _no_collection(), torch.cuda.graph(graph, stream=_stream(device)):
                self.output = self.step(self.inputs)
        except RuntimeError as error:
            GraphedStep.possible = False
            self.close()
            torch.cuda.set_stream(current)  # a recording that ends in an error does not go back itself
            for generator, state in zip(drawn_from, untouched, strict=True):
                generator.graphsafe_set_state(state)  # the one it has waits for the end of the recording
            _logger.warning(
                "a training step cannot be recorded as a CUDA graph, so that all take longer: %s",
                str(error.__context__ or error).splitlines()[0],
            )
            return
        self.graph = graph

    def close(self) -> None:
        """Give the recording up, with the GPU memory it holds."""
        self.graph, self.output, self.inputs = None, None, []


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all steps of a device: libraries keep memory for each stream that they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is collected while a step is recorded may hold another recording or its memory."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
