"""Training steps per second of each block, and what the allocator setting is worth, on this machine.

``python benchmarks/speed.py`` on an otherwise idle machine rewrites benchmarks/results/speed.jsonl and
allocator.jsonl. Ratios are measured side by side in one run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from common import MOBILENET, RESNET20, RESULTS, machine, plain_operators

from metaaug_cli.layout import fast_layout
from metaaug_cli.memory import keep_freed_memory
from metaaug_cli.prepare import prepare_chain, schedule_of
from metaaug_cli.quantization import reconstruct
from metaaug_cli.quantization.blocks import Block, search_activation_scales
from metaaug_cli.quantization.cache import BlockData, Stream, Values
from metaaug_cli.quantization.losses import reconstruction_loss
from metaaug_cli.quantization.reconstruct import BlockLearner, Schedule, training
from metaaug_cli.recipe.config import Recipe

_ROUNDS = 7
_BATCH = 32
_CHOSEN = {
    "resnet20": (RESNET20, ("stage1.0", "stage2.0", "stage3.2")),
    "mobilenet_v1_075": (MOBILENET, ("blocks.0", "blocks.3", "blocks.9")),
}


def blocks_of(name: str) -> list[Block]:
    """The named blocks of one network at W4A4, integer placement."""
    network, chosen = _CHOSEN[name]
    chain = prepare_chain(network.load("random").module, (3, network.size, network.size), Recipe())
    return [b for b in chain.blocks if b.name in chosen]


def seconds_in_turn(*runs: Callable[[], object]) -> list[float]:
    """Medians of several rounds after one warm-up, in which the runs take turns."""
    measured: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS + 1):
        for run, kept in zip(runs, measured, strict=True):
            started = time.perf_counter()
            run()
            kept.append(time.perf_counter() - started)
    return [median(kept[1:]) for kept in measured]


def seconds(run: Callable[[], object]) -> float:
    """Median of several rounds after one warm-up."""
    return seconds_in_turn(run)[0]


def inputs_of(block: Block) -> Values:
    """Random inputs of one batch."""
    shapes = [[int(s) for s in v.meta["val"].shape[1:]] for v in block.stage.inputs]
    return tuple(torch.rand(_BATCH, *shape) for shape in shapes)


def learner_of(block: Block, inputs: Values, schedule: Schedule) -> BlockLearner:
    """The block's learner on one batch of inputs."""
    stream = Stream(inputs, inputs[0].device)
    with torch.no_grad():
        targets = block.float_block(*inputs)
    data = BlockData(stream, stream, block.float_block, targets, block.computed)
    return BlockLearner(block, data, schedule, torch.Generator().manual_seed(0))


def training_step(learner: BlockLearner) -> None:
    """One step, the choice of the batch included."""
    with training(learner.block, learner.schedule.quant_prob, learner.drops):
        learner.step(learner.schedule.iterations - 1)


def plain_step(learner: BlockLearner) -> None:
    """The same training step as its formulas in PyTorch operators."""
    with plain_operators([learner.block]), patch.object(reconstruct, "_loss", reconstruction_loss):
        training_step(learner)


def measure(name: str, schedule: Schedule) -> list[dict[str, object]]:
    """One line per block: steps per second, a step against the plain formulas and the float forward pass."""
    lines: list[dict[str, object]] = []
    for block in blocks_of(name):
        usual = inputs_of(block)
        inputs = tuple(fast_layout(x) for x in usual)
        search_activation_scales(block, inputs)
        step, plain = seconds_in_turn(
            partial(training_step, learner_of(block, inputs, schedule)),
            partial(plain_step, learner_of(block, usual, schedule)),
        )
        with torch.no_grad():
            forward = seconds(partial(block.float_block, *inputs))
        lines.append(
            {
                "model": name,
                "block": block.name,
                "steps_per_second": 1 / step,
                "against_float": step / forward,
                "against_plain": plain / step,
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "machine": machine(uses_gpu=False),
            }
        )
    return lines


def one_step_seconds(block_name: str) -> float:
    """Seconds of one step of a MobileNet block in this process."""
    block = next(b for b in blocks_of("mobilenet_v1_075") if b.name == block_name)
    inputs = tuple(fast_layout(x) for x in inputs_of(block))
    search_activation_scales(block, inputs)
    return seconds(partial(training_step, learner_of(block, inputs, schedule_of(Recipe()))))


def allocator(block_name: str) -> dict[str, object]:
    """The same step in two fresh processes, with the system's allocator settings and with ours."""
    found = {}
    for setting in ("default", "kept"):
        command = [sys.executable, __file__, setting, block_name]
        found[setting] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "block": f"mobilenet_v1_075 {block_name}",
        "seconds_default": found["default"],
        "seconds_kept": found["kept"],
        "ratio": found["default"] / found["kept"],
        "machine": machine(uses_gpu=False),
    }


def _write(name: str, lines: list[dict[str, object]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


def main() -> None:
    """Measure everything, or one step for ``allocator``."""
    if len(sys.argv) == 3:
        if sys.argv[1] == "kept":
            keep_freed_memory()
        print(one_step_seconds(sys.argv[2]))
        return
    allocated = [allocator(name) for name in ("blocks.0", "blocks.3")]
    keep_freed_memory()  # as the command does
    lines = [line for name in _CHOSEN for line in measure(name, schedule_of(Recipe()))]
    _write("speed", lines)
    _write("allocator", allocated)


if __name__ == "__main__":
    main()
