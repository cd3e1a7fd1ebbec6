"""Quantizing a network, from the user's model and images to learned quantizers: the method in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from metaaug_cli.artifacts import Fingerprint, RunDirectory, RunInfo, hash_graph
from metaaug_cli.augment import augmented_copies
from metaaug_cli.blocks import Block, Chain, search_activation_scales
from metaaug_cli.cache import BlockData, Budget, Stream, default_budget, place_for, stage_bytes
from metaaug_cli.capture import export_program
from metaaug_cli.config import Recipe
from metaaug_cli.data import CalibrationSet
from metaaug_cli.deploy import deploy
from metaaug_cli.errors import MetaAugError, UsageError
from metaaug_cli.memory import peak_memory_mib
from metaaug_cli.models import LoadedModel
from metaaug_cli.prepare import prepare_chain, schedule_of
from metaaug_cli.reconstruct import BlockHistory, reconstruct_block
from metaaug_cli.simulation import IntegerSimulation

_logger = logging.getLogger(__name__)
_SCALE_SEARCH_IMAGES = 64
_AGREEMENT_IMAGES, _AGREEMENT_BATCH = 128, 32


class Progress(Protocol):
    """What a caller may want to show while a run is going."""

    def planned(self, blocks: int, steps_per_block: int) -> None:
        """Called once, before the first block."""

    def step(self, block: Block, done: int, total: int) -> None:
        """One optimizer step of ``block`` is done."""

    def finished(self, block: Block, history: BlockHistory, *, resumed: bool) -> None:
        """``block`` is learned, or was loaded from the run directory."""


class _Silent:
    def planned(self, blocks: int, steps_per_block: int) -> None:
        pass

    def step(self, block: Block, done: int, total: int) -> None:
        pass

    def finished(self, block: Block, history: BlockHistory, *, resumed: bool) -> None:
        pass


@dataclass(frozen=True)
class QuantizedModel:
    """The result: the float network, its quantized twin ready to export, and what learning did."""

    float_module: fx.GraphModule
    deployed: fx.GraphModule
    chain: Chain
    histories: list[BlockHistory]
    input_size: tuple[int, int, int]
    metrics: dict[str, Any]


def quantize(
    model: LoadedModel,
    calibration: CalibrationSet,
    *,
    recipe: Recipe,
    run_dir: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    cache_gb: float | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize a network after training.

    Args:
        model: From ``models.load_model``.
        calibration: Images normalised for this model.
        recipe: Every setting that can change the result.
        run_dir: Where each finished block is kept; None keeps nothing.
        resume: Continue the run that ``run_dir`` holds.
        device: "auto", "cpu" or "cuda".
        cache_gb: GiB of activations to keep; None for half of the free memory.
        command: The command line, for the record.
        progress: Told of each step and block.

    Raises:
        GraphError: The network cannot be captured or cut.
        RecipeError: ``run_dir`` holds a different run.
        UsageError: The device is not there, or ``run_dir`` is taken.
    """
    progress = progress or _Silent()
    target = pick_device(device)
    channels, height, width = calibration.images.shape[1:]
    input_size = (channels, height, width)
    program = export_program(model.module, input_size)
    chain = prepare_chain(program, input_size, recipe)

    info = _run_info(model, calibration, recipe, chain, str(target), command)
    directory = RunDirectory(run_dir) if run_dir else None
    done = directory.start(info, recipe, program, resume=resume) if directory else 0

    progress.planned(len(chain.blocks), schedule_of(recipe).iterations)
    started = time.monotonic()
    images = _with_copies(calibration, recipe)
    walker = _Walker(images, len(calibration.images), target, default_budget(target, cache_gb))
    with _out_of_memory_hint():
        histories = [
            _walk_block(block, walker, recipe, progress, directory, resumed=block.index < done)
            for block in chain.to(target).blocks
        ]
    deployed = deploy(chain.to(torch.device("cpu")))
    metrics = _metrics(chain, histories, calibration.images, deployed, time.monotonic() - started)
    if directory is not None:
        directory.finish(info, metrics)
    return QuantizedModel(chain.module, deployed, chain, histories, input_size, metrics)


def _with_copies(calibration: CalibrationSet, recipe: Recipe) -> Tensor:
    """The calibration images, followed by the recipe's augmented copies of them."""
    copies = recipe.augmentation.copies_for(len(calibration.images))
    if copies == 0 or recipe.reconstruction.method == "nearest":
        return calibration.images
    generator = torch.Generator().manual_seed(recipe.seed)
    made = augmented_copies(
        calibration.images, calibration.preprocessing, recipe.augmentation.kind, copies, generator
    )
    return torch.cat([calibration.images, made])


def _walk_block(
    block: Block,
    walker: _Walker,
    recipe: Recipe,
    progress: Progress,
    directory: RunDirectory | None,
    *,
    resumed: bool,
) -> BlockHistory:
    """Learn one block, or load it where an earlier run has finished it, and move past it."""
    if directory is not None and resumed:
        history = directory.load_block(block)
        walker.enter(block, learns=False)
    else:
        history = _learn_block(block, walker, recipe, progress)
        if directory is not None:
            directory.save_block(block, history)
    progress.finished(block, history, resumed=resumed)
    walker.leave(block)
    return history


def _learn_block(block: Block, walker: _Walker, recipe: Recipe, progress: Progress) -> BlockHistory:
    """One block: scales, augmentation (MetaAug's place), reconstruction."""
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + block.index)
    data = walker.enter(block, learns=recipe.reconstruction.method != "nearest")
    chosen = torch.randperm(len(data), generator=generator)[:_SCALE_SEARCH_IMAGES]
    search_activation_scales(block, data.quantized_stream.batch(chosen))
    # MetaAug learns the augmenter T here, before the block is learned on the images and T(images).
    schedule = schedule_of(recipe)
    _logger.info(
        "block %s: %d layers, %d activation grids", block.name, len(block.weights), len(block.activations)
    )
    return reconstruct_block(
        block, data, schedule, generator=generator, tick=lambda i, n: progress.step(block, i, n)
    )


class _Walker:
    """Carries the two activation streams from block to block, within the memory budget."""

    def __init__(self, images: Tensor, originals: int, device: torch.device, budget: Budget) -> None:
        self.images, self.originals = len(images), originals
        self.budget = budget
        self.float_stream = Stream((images,), device)
        self.quantized_stream = Stream((images,), device)
        self.place: torch.device | None = None
        self.targets: tuple[Tensor, ...] | None = None

    def enter(self, block: Block, *, learns: bool) -> BlockData:
        """Bring both streams to the block's input and, where there is room, compute its targets once."""
        self.place = place_for(stage_bytes(block.stage, self.images), self.budget)
        if self.place is None and learns:
            _logger.warning(
                "block %s: activations exceed the cache budget and are recomputed each step", block.name
            )
        self.float_stream.keep(self.place)
        self.quantized_stream.keep(self.place)
        self.targets = None
        if self.place is not None:
            after = Stream(self.float_stream.stored, self.float_stream.device)
            after.pending = [block.float_block]
            self.targets = after.compute(self.place)
        return BlockData(
            self.float_stream,
            self.quantized_stream,
            block.float_block,
            self.targets,
            block.computed,
            self.originals,
        )

    def leave(self, block: Block) -> None:
        """Move both streams past the block."""
        if self.targets is not None:
            self.float_stream.replace(self.targets)
        else:
            self.float_stream.advance(block.float_block, place=None)
        self.quantized_stream.advance(block.quantized_block, place=self.place)


def pick_device(name: str) -> torch.device:
    """The device for "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no CUDA device", hint="use --device cpu, or --device auto"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _run_info(
    model: LoadedModel,
    calibration: CalibrationSet,
    recipe: Recipe,
    chain: Chain,
    device: str,
    command: str | None,
) -> RunInfo:
    output = next(n for n in chain.module.graph.nodes if n.op == "output").all_input_nodes[0]
    return RunInfo(
        model=model.name,
        weights=model.weights,
        preprocessing=calibration.preprocessing.to_dict(),
        num_outputs=int(output.meta["val"].shape[-1]),
        calibration={
            "origin": calibration.origin,
            "images": len(calibration.images),
            "skipped": list(calibration.skipped),
        },
        fingerprint=Fingerprint(
            recipe=recipe.sha256(),
            weights=model.weights_sha256,
            graph=hash_graph(chain.module),
            calibration=calibration.sha256,
        ),
        blocks=[block.name for block in chain.blocks],
        device=device,
        command=command,
    )


@torch.no_grad()
def _metrics(
    chain: Chain, histories: list[BlockHistory], images: Tensor, deployed: fx.GraphModule, seconds: float
) -> dict[str, Any]:
    """What a run measured of itself; the agreement is on images the network was fitted on."""
    shown, simulation = images[:_AGREEMENT_IMAGES], IntegerSimulation(deployed)
    same = [
        (chain.module(part).argmax(-1) == simulation(part).argmax(-1)).float()
        for part in shown.split(_AGREEMENT_BATCH)
    ]
    return {
        "calibration_agreement": float(torch.cat(same).mean()),
        "calibration_agreement_images": len(shown),
        "seconds": round(seconds, 1),
        "peak_memory_mib": peak_memory_mib(),
        "blocks": {
            block.name: {
                "loss_before": h.loss_before,
                "loss_after": h.loss_after,
                "seconds": round(h.seconds, 2),
            }
            for block, h in zip(chain.blocks, histories, strict=True)
        },
    }


@contextmanager
def _out_of_memory_hint() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MetaAugError(
            f"the GPU is out of memory: {str(error).splitlines()[0]}",
            hint="lower --batch or --cache-gb, or use --device cpu; finished blocks are kept, "
            "continue with --resume",
        ) from error
