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

from metaaug_cli.augmentation.learned import LearnedAugmentation
from metaaug_cli.augmentation.warmup import WarmUp
from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.deployment.deploy import deploy
from metaaug_cli.errors import MetaAugError, UsageError
from metaaug_cli.graph.capture import export_program
from metaaug_cli.graph.graph_tools import hash_graph
from metaaug_cli.learning_images import LearningImages, gather_images
from metaaug_cli.learning_images import Progress as ImageProgress
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.prepare import (
    augmentation_kind,
    augmenter_of,
    copies_of,
    fitted_to,
    learns,
    learns_augmenter,
    meta_schedule_of,
    prepare_chain,
    require_finite,
    schedule_of,
    starts_second_order,
)
from metaaug_cli.quantization.blocks import Block, Chain, search_activation_scales, widen_output_grids
from metaaug_cli.quantization.cache import BlockData, default_budget
from metaaug_cli.quantization.reconstruct import (
    PROBE_IMAGES,
    BlockHistory,
    Schedule,
    probe_loss,
    reconstruct_block,
)
from metaaug_cli.quantization.start import start_second_order
from metaaug_cli.quantization.walk import Walker
from metaaug_cli.recipe.augment_kinds import learned_part
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.runs.artifacts import RunDirectory
from metaaug_cli.runs.augmentation_files import AugmentationFiles
from metaaug_cli.runs.measured import run_metrics
from metaaug_cli.runs.run_info import Fingerprint, RunInfo

_logger = logging.getLogger(__name__)
_SCALE_SEARCH_IMAGES, _ROUNDING_IMAGES = 64, 128
# Nothing makes synthetic images cause the logits of real ones: ResNet-20's reach 0.7 to 0.9 of the greatest.
_SYNTHETIC_HEADROOM = 2.0


class Progress(ImageProgress, Protocol):
    """What a caller may want to show while a run is going."""

    def planned(self, blocks: int, steps_per_block: int) -> None:
        """Called once, before the first block."""

    def warming_up(self, done: int, total: int) -> None:
        """One step of the augmenter's warm-up is done."""

    def warmed_up(self, warmup: WarmUp) -> None:
        """The augmenter reproduces the images."""

    def step(self, block: Block, done: int, total: int) -> None:
        """One step of ``block`` is done, of the augmenter's and the block's own together."""

    def finished(self, block: Block, history: BlockHistory, *, resumed: bool) -> None:
        """``block`` is learned, or was loaded from the run directory."""


class _Silent:
    def making_images(self, done: int, total: int, text: str) -> None:
        pass

    def made_images(self, count: int) -> None:
        pass

    def planned(self, blocks: int, steps_per_block: int) -> None:
        pass

    def warming_up(self, done: int, total: int) -> None:
        pass

    def warmed_up(self, warmup: WarmUp) -> None:
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
    run_dir: Path | str | None = None,
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
        InputError: The float network gives NaN or infinite values for the images.
        RecipeError: ``run_dir`` holds a different run.
        UsageError: The device is not there, or ``run_dir`` is taken.
    """
    progress = progress or _Silent()
    recipe = fitted_to(recipe, calibration)
    target = pick_device(device)
    channels, height, width = calibration.images.shape[1:]
    input_size = (channels, height, width)
    program = export_program(model.module, input_size)
    chain = prepare_chain(program, input_size, recipe)
    require_finite(chain, calibration.images)

    info = _run_info(model, calibration, recipe, chain, str(target), command)
    directory = RunDirectory(Path(run_dir)) if run_dir else None
    done = directory.start(info, recipe, program, resume=resume) if directory else 0

    progress.planned(len(chain.blocks), _steps_per_block(recipe))
    started = time.monotonic()
    with _out_of_memory_hint():
        images = gather_images(model, calibration, recipe, target, progress)
        if images.holds_synthetic:
            widen_output_grids(chain, _SYNTHETIC_HEADROOM)
        run = _start(chain.to(target), images, recipe, target, cache_gb, directory, progress)
        histories = [run.walk(block, resumed=block.index < done) for block in chain.blocks]
        run.show()
    learned_from = run.walker.images[: run.walker.originals]
    deployed = deploy(chain.to(torch.device("cpu")))
    metrics = run_metrics(chain, histories, learned_from, deployed, time.monotonic() - started)
    if directory is not None:
        directory.finish(info, metrics)
    return QuantizedModel(chain.module, deployed, chain, histories, input_size, metrics)


def _steps_per_block(recipe: Recipe) -> int:
    return schedule_of(recipe).iterations + (recipe.metaaug.steps if learns_augmenter(recipe) else 0)


def _start(
    chain: Chain,
    images: LearningImages,
    recipe: Recipe,
    device: torch.device,
    cache_gb: float | None,
    directory: RunDirectory | None,
    progress: Progress,
) -> _Run:
    """What all blocks share: the images on their way, and the learned augmenter where the recipe has one."""
    originals, budget = images.originals, default_budget(device, cache_gb)
    walker = Walker(images.with_copies(recipe), len(originals), images.held_back, device, budget)
    learned = None
    if learns_augmenter(recipe):
        learned = LearnedAugmentation(
            augmenter_of(recipe),
            meta_schedule_of(recipe),
            chain.blocks,
            originals,
            images.preprocessing,
            operations=learned_part(augmentation_kind(recipe))[1],
            copies=copies_of(recipe, len(originals)),
            seed=recipe.seed,
            device=device,
        )
        warmed = learned.warm_up(recipe.metaaug.warmup_steps, progress.warming_up)
        if warmed is not None:
            progress.warmed_up(warmed)
    files = AugmentationFiles(directory, [b.name for b in chain.blocks]) if directory and learned else None
    return _Run(walker, recipe, progress, directory, learned, files)


@dataclass
class _Run:
    """The method, block by block."""

    walker: Walker
    recipe: Recipe
    progress: Progress
    directory: RunDirectory | None
    learned: LearnedAugmentation | None
    files: AugmentationFiles | None

    def walk(self, block: Block, *, resumed: bool) -> BlockHistory:
        """Learn one block, or load it where an earlier run has finished it, and move past it."""
        if self.directory is not None and resumed:
            history = self.directory.load_block(block)
            if self.learned is not None and self.files is not None:
                self.files.load(block, self.learned)
            self.walker.enter(block, learns=False)
        else:
            history = self._learn(block)
            if self.directory is not None:
                self.directory.save_block(block, history)
            self.show()
        self.progress.finished(block, history, resumed=resumed)
        block.quantized_block.requires_grad_(requires_grad=False)
        self.walker.leave(block)
        return history

    def show(self) -> None:
        """Write the page on the augmenter for the blocks that are finished."""
        if self.files is not None:
            self.files.write_page()

    def _learn(self, block: Block) -> BlockHistory:
        """One block: scales searched, the augmenter taught, the block reconstructed on D and T(D)."""
        recipe = self.recipe
        schedule, total = schedule_of(recipe), _steps_per_block(recipe)
        generator = torch.Generator().manual_seed((recipe.seed * 100_003 + block.index) % 2**63)
        data = self.walker.enter(block, learns=schedule.iterations > 0)
        self._begin(block, data, torch.randperm(len(data), generator=generator))
        _logger.info(
            "block %s: %d layers, %d activation grids", block.name, len(block.weights), len(block.activations)
        )
        augmentation: dict[str, float] = {}
        if self.learned is not None and block.index > 0:
            data, augmentation = self._augment(self.learned, block, data, schedule, total, generator)
        before = total - schedule.iterations
        history = reconstruct_block(
            block,
            data,
            schedule,
            generator=generator,
            tick=lambda done, _: self.progress.step(block, before + done, total),
        )
        history.losses = self._losses(block, data)
        history.augmentation = augmentation
        return history

    def _begin(self, block: Block, data: BlockData, drawn: Tensor) -> None:
        """Activation scales searched, weights rounded: what learning starts from, or all that is done."""
        if not starts_second_order(self.recipe):
            search_activation_scales(block, data.quantized_stream.batch(drawn[:_SCALE_SEARCH_IMAGES]))
            return
        drawn = drawn[:_ROUNDING_IMAGES]
        floats = None if learns(self.recipe) else data.float_stream.batch(drawn)
        seed = self.recipe.seed * 100_003 + block.index
        start_second_order(block, data.quantized_stream.batch(drawn), floats, seed)

    def _augment(
        self,
        learned: LearnedAugmentation,
        block: Block,
        data: BlockData,
        schedule: Schedule,
        total: int,
        generator: torch.Generator,
    ) -> tuple[BlockData, dict[str, float]]:
        """Teach T what this block needs and add T(D) to the block's images."""
        if block.is_edge:  # the last layer teaches nothing, but overfits most: it too learns on T(D)
            return self.walker.with_copies(block, learned.make(block, generator).images), {}
        meta = learned.teach(
            block,
            data,
            schedule,
            generator=generator,
            tick=lambda done, _: self.progress.step(block, done, total),
        )
        copies = learned.make(block, generator)
        if self.files is not None:
            self.files.save(block, learned, meta, copies)
        summary = {
            "seconds": round(meta.seconds, 2),
            "distance": copies.distance,
            "similarity": copies.similarity,
        }
        return self.walker.with_copies(block, copies.images), summary

    def _losses(self, block: Block, data: BlockData) -> dict[str, float]:
        """Reconstruction loss after learning by image set: how far the block overfits."""
        losses = {"originals": probe_loss(block, data, _probe(len(data)))}
        losses["trained"] = losses["originals"]
        if len(data.float_stream) > len(data):
            losses["trained"] = probe_loss(block, data, _probe(len(data.float_stream)))
        held_back = self.walker.held_back_data(block)
        if held_back is not None:
            losses["held_back"] = probe_loss(block, held_back, _probe(len(held_back)))
        return losses


def _probe(count: int) -> Tensor:
    """Up to 256 images spread over ``count``."""
    return torch.linspace(0, count - 1, min(count, PROBE_IMAGES)).round().long()


def pick_device(name: str) -> torch.device:
    """The device for "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        UsageError: It is none of them, or CUDA was asked for and is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"{name!r} is not a device", hint="use auto, cpu or cuda")
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
