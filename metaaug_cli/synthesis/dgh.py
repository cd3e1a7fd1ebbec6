"""Calibration images from the network alone (DGH: Dikstein et al. 2024, arXiv 2410.22110).

The pixels of all images are learned so that, over the whole set, every batch norm sees the statistics it
stored in training. Each batch's latest statistics are kept; the current batch's are replaced by its
differentiable ones, so that the memory is that of one batch however many images there are.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaaug_cli.calibration.data import (
    SYNTHETIC_ORIGIN,
    SYNTHETIC_SOURCE,
    CalibrationSet,
    make_calibration_set,
)
from metaaug_cli.errors import GraphError, InputError, UsageError
from metaaug_cli.graph.bn_statistics import BatchNormProbe, Moments, Observation, batch_norm_probe
from metaaug_cli.graph.capture import capture_unfolded
from metaaug_cli.graph.graph_tools import hash_graph
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.synthesis.start import natural_noise, white_noise
from metaaug_cli.synthesis.state import StateFile, require_absent
from metaaug_cli.synthesis.views import Views

_logger = logging.getLogger(__name__)

Tick = Callable[[int, int, str], None]
Stretch = Literal["plain", "regularised", "off"]
Start = Literal["natural", "noise"]

# Beside a distance in the batch norms' own units, "plain" suits ResNet-20 and MobileNet-V1 alike.
STRETCH_WEIGHT = {"plain": 1e-4, "regularised": 5e-4}
# To raise when the same settings give other images: kept sets and unfinished ones are then not used.
_VERSION = 3
_SHOWN = {
    "batch_size": "--batch",
    "whole_set": "--no-whole-set",
    "preprocessing": "--no-preprocessing",
    "rate": "learning rate",
}
# RAdam's first five steps after a reset hardly move: they must not count as another plateau.
_PLATEAU = {"factor": 0.5, "patience": 10, "cooldown": 6, "threshold": 1e-3}


@dataclass(frozen=True)
class SynthesisSettings:
    """Everything besides the network that decides the images.

    Args:
        num: How many images.
        seed: Of the start and of every view.
        iterations: Optimizer steps that each image gets.
        batch_size: Images in memory at a time.
        rate: RAdam's first learning rate, in normalised pixel units.
        whole_set: Match the statistics of all images together; False matches each batch's alone.
        preprocessing: Show views as training does; False shows the stored images as they are.
        stretch: Spread the logits of each image: "plain" rewards their range, "regularised" draws greatest
            and least to half of what feature and class-weight norms allow, "off" does neither.
        start: What the images are made from: "natural" noise varies from image to image as photographs do,
            "noise" is Gaussian in every pixel, as published.
    """

    num: int = 512
    seed: int = 0
    iterations: int = 150
    batch_size: int = 32
    rate: float = 1.0
    whole_set: bool = True
    preprocessing: bool = True
    stretch: Stretch = "plain"
    start: Start = "natural"

    def __post_init__(self) -> None:
        for key in ("num", "iterations", "batch_size"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key, known in (("stretch", get_args(Stretch)), ("start", get_args(Start))):
            if getattr(self, key) not in known:
                hint = f"use one of: {', '.join(known)}"
                raise UsageError(f"{key} {getattr(self, key)!r} is unknown", hint=hint)
        if not self.rate > 0 or not math.isfinite(self.rate):
            raise UsageError(f"rate must be above 0, got {self.rate}")

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.num // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.iterations * self.batches


@dataclass
class SynthesisHistory:
    """Batch-norm loss of the set after each pass over it."""

    losses: list[float] = field(default_factory=list)


def synthesize_calibration_set(
    model: LoadedModel,
    settings: SynthesisSettings,
    *,
    device: torch.device | None = None,
    state_path: Path | None = None,
    resume: bool = False,
    state_required: bool = True,
    tick: Tick | None = None,
    history: SynthesisHistory | None = None,
) -> CalibrationSet:
    """Make calibration images from what a network's batch norms remember.

    Args:
        model: A network with batch norms, not folded.
        settings: How many images, and how.
        device: Where to compute; None for the CPU. Mixed precision on CUDA only.
        state_path: Where to keep the state, from the first step on; the caller deletes it when the set is
            stored.
        resume: Continue from ``state_path``. On a CPU the images are those of an uninterrupted run.
        state_required: False goes on without a state where none can be written, and starts afresh where
            ``resume`` finds none that fits.
        tick: Called with (steps done, steps, a few words with the loss).
        history: Filled with the loss of each pass of this call.

    Returns:
        The images on the 8-bit pixel grid, as an ordinary calibration set.

    Raises:
        InputError: The network has no batch norms, or the state cannot be read or written.
        UsageError: The stretching does not suit the network, or the state belongs to other settings.
        GraphError: The network computes NaN or infinite values.
    """
    if state_path is not None and not resume:
        require_absent(state_path)
    state = None
    if state_path is not None:
        state = StateFile(state_path, fingerprint(model, settings), required=state_required)
    synthesis = _Synthesis(model, settings, device or torch.device("cpu"))
    kept = _kept_state(state) if state is not None and resume else None
    if kept is not None:
        synthesis.load(*kept)
    else:
        _warn_if_untrained(synthesis.probe, model.name)
        synthesis.observe_all()
        if state is not None:
            state.save(*synthesis.state())  # an unwritable place shows now, and every stop can resume
    synthesis.run(state, tick, history)
    origin = f"{SYNTHETIC_ORIGIN} {model.name}, seed {settings.seed}"
    sources = [f"{SYNTHETIC_SOURCE}{i:05d}" for i in range(settings.num)]
    return make_calibration_set(synthesis.images(), model.preprocessing, sources, origin=origin)


def _kept_state(state: StateFile) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What an interrupted synthesis left behind; None where nothing fits and nothing has to."""
    try:
        return state.load()
    except (InputError, UsageError) as error:
        if state.required:
            raise
        _logger.info("%s", error.message)
        return None


def estimate_seconds(
    model: LoadedModel, settings: SynthesisSettings, *, device: torch.device | None = None
) -> float:
    """Seconds that the synthesis will take, from two steps on a batch of noise.

    Raises:
        InputError: The network has no batch norms.
        UsageError: The stretching does not suit the network.
    """
    few = SynthesisSettings(**{**asdict(settings), "num": min(settings.num, settings.batch_size)})
    synthesis = _Synthesis(model, few, device or torch.device("cpu"))
    synthesis.observe_all()
    synthesis.take_step()
    started = time.perf_counter()
    synthesis.take_step()
    return (time.perf_counter() - started) * settings.iterations * settings.num / few.num


class _Synthesis:
    """The images being learned and everything a resumed run needs of the past."""

    def __init__(self, model: LoadedModel, settings: SynthesisSettings, device: torch.device) -> None:
        preprocessing = model.preprocessing
        size = (preprocessing.channels, *preprocessing.size)
        self.settings, self.preprocessing, self.device = settings, preprocessing, device
        self.probe = batch_norm_probe(model.module, size).to(device)
        self.loss = _Loss(self.probe, settings.stretch)
        self.views = Views(preprocessing, enabled=settings.preprocessing, device=device)
        generator = torch.Generator().manual_seed(settings.seed)
        counts = [len(part) for part in torch.empty(settings.num).split(settings.batch_size)]
        first = {"natural": natural_noise, "noise": white_noise}[settings.start]
        starts = (first(count, self.views.stored_size, preprocessing, generator) for count in counts)
        self.batches = [start.to(device).requires_grad_() for start in starts]
        self.shares = torch.tensor(counts, device=device).view(-1, 1, 1) / settings.num
        self.optimizer = torch.optim.RAdam(self.batches, lr=settings.rate)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, **_PLATEAU)  # type: ignore[arg-type]
        self.seen = torch.zeros(len(counts), *self.loss.target.shape, device=device)
        self.step, self.last_loss = 0, math.inf
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=device)  # read once a pass: a GPU waits

    def run(self, state: StateFile | None, tick: Tick | None, history: SynthesisHistory | None) -> None:
        """Take all remaining steps."""
        while self.step < self.settings.steps:
            self.take_step()
            if history is not None and self.step % len(self.batches) == 0:
                history.losses.append(self.last_loss)
            if state is not None:
                state.save_if_due(*self.state())
            if tick is not None:
                text = f"BN loss {self.last_loss:.3g}" if math.isfinite(self.last_loss) else ""
                tick(self.step, self.settings.steps, text)

    @torch.no_grad()
    def observe_all(self) -> None:
        """The statistics of every batch before the first step; whole-set matching needs them."""
        for index in range(len(self.batches) if self.settings.whole_set else 0):
            self.seen[index] = self._observe(index, -1 - index)[0]

    def take_step(self) -> None:
        """One step of the next batch; at the end of a pass, perhaps a lower rate."""
        index = self.step % len(self.batches)
        moments, observation = self._observe(index, self.step)
        total, stretch = moments, self.loss.stretch(observation)
        if self.settings.whole_set:
            others = self.seen * self.shares
            total = others.sum(0) - others[index] + moments * self.shares[index]
            stretch = stretch * self.shares[index].squeeze()  # both terms are the set's, however it is split
            self.seen[index] = moments.detach()
        match = self.loss.match(total)
        self.optimizer.zero_grad(set_to_none=True)
        (match + stretch).backward()
        self.optimizer.step()  # steps the current batch only: the others have no gradient
        self.epoch_loss += match.detach().double() / len(self.batches)
        self.step += 1
        if self.step % len(self.batches) == 0:
            self._end_pass()

    def _end_pass(self) -> None:
        self.last_loss = float(self.epoch_loss)
        self.epoch_loss.zero_()
        if not math.isfinite(self.last_loss):
            raise GraphError("the network computes NaN or infinite values of synthetic images")
        before = self.optimizer.param_groups[0]["lr"]
        self.plateau.step(self.last_loss)
        if self.optimizer.param_groups[0]["lr"] < before:
            self.optimizer.state.clear()  # moments of the coarser search would throw the finer one off

    def _observe(self, index: int, step: int) -> tuple[Tensor, Observation]:
        # A generator of its own for each step: a resumed run draws the same without a stored stream.
        seed = random.Random(f"{self.settings.seed} {step}").getrandbits(62)
        images = self.views.drawn(self.batches[index], torch.Generator().manual_seed(seed))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            observation = self.probe(images)
        return _joined(observation), observation

    @torch.no_grad()
    def images(self) -> Tensor:
        """The finished images (N, C, H, W) on the 8-bit pixel grid, normalised, on the CPU."""
        preprocessing = self.preprocessing
        finished = torch.empty(self.settings.num, preprocessing.channels, *preprocessing.size)
        for part, batch in zip(finished.split(self.settings.batch_size), self.batches, strict=True):
            final = self.views.final(batch).cpu()
            part.copy_(preprocessing.normalise(preprocessing.to_pixels(final)))
        return finished

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that later steps depend on."""
        tensors: dict[str, Tensor] = {"seen": self.seen}
        for index, batch in enumerate(self.batches):
            tensors[f"pixels.{index}"] = batch.detach()
            kept = self.optimizer.state.get(batch, {})
            tensors |= {f"optimizer.{key}.{index}": value for key, value in kept.items()}
        plateau = {k: v for k, v in self.plateau.state_dict().items() if isinstance(v, (int, float))}
        scalars = {
            "step": self.step,
            "epoch_loss": float(self.epoch_loss),
            "last_loss": self.last_loss,
            "rate": self.optimizer.param_groups[0]["lr"],
            "plateau": plateau,
        }
        return tensors, scalars

    def load(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Take over a ``state``."""
        self.seen.copy_(tensors["seen"])
        for index, batch in enumerate(self.batches):
            with torch.no_grad():
                batch.copy_(tensors[f"pixels.{index}"])
            kept = {k.split(".")[1]: v for k, v in tensors.items() if _belongs(k, index)}
            if kept:
                self.optimizer.state[batch] = {
                    k: v if k == "step" else v.to(self.device) for k, v in kept.items()
                }
        self.step, self.last_loss = scalars["step"], scalars["last_loss"]
        self.epoch_loss.fill_(scalars["epoch_loss"])
        self.optimizer.param_groups[0]["lr"] = scalars["rate"]
        self.plateau.load_state_dict(scalars["plateau"])


class _Loss:
    """How far statistics are from the stored ones, and the stretching of the logits."""

    def __init__(self, probe: BatchNormProbe, stretch: Stretch) -> None:
        means = torch.cat([layer.mean for layer in probe.layers])
        stds = torch.cat([layer.variance.sqrt() for layer in probe.layers])
        self.target = torch.stack([means, stds])
        share = [1 / (len(probe.layers) * layer.mean.numel()) for layer in probe.layers]
        weights = [s / (n.variance + n.epsilon) for s, n in zip(share, probe.layers, strict=True)]
        self.channel_weights = torch.cat(weights)
        self.kind, self.weight = stretch, probe.classifier_weight
        if stretch == "regularised" and self.weight is None:
            raise UsageError(
                "regularised stretching needs a network whose output comes straight from a linear layer",
                hint="use --stretch plain, or --stretch off",
            )

    def match(self, moments: Tensor) -> Tensor:
        """Squared distance of means and deviations to the stored ones, averaged over channels and layers; ().

        The unit is what the batch norm divides by, so that no layer counts for the size of its values. (As
        published, without units, a few depthwise layers decide: after the same steps MobileNet-V1 is at least
        three times as far from the stored statistics, in either measure.)

        Args:
            moments: (2, T) mean and mean square of all channels of all layers.
        """
        seen = Moments(*moments)
        gaps = (torch.stack([seen.mean, seen.std]) - self.target).square()
        return (gaps * self.channel_weights).sum()

    def stretch(self, seen: Observation) -> Tensor:
        """The weighted stretching term; ()."""
        if self.kind == "off":
            return torch.zeros((), device=seen.outputs.device)
        if seen.outputs.dim() != 2:
            raise UsageError(
                f"stretching needs a row of logits for an image, the network gives "
                f"{tuple(seen.outputs.shape[1:])}",
                hint="use --stretch off",
            )
        (high, highest), (low, lowest) = seen.outputs.max(1), seen.outputs.min(1)
        if self.kind == "plain":
            return -STRETCH_WEIGHT["plain"] * (high - low).mean()
        assert self.weight is not None
        assert seen.features is not None
        reach = 0.5 * seen.features.norm(dim=1)
        norms = self.weight.norm(dim=1)
        gaps = (high.abs() - reach * norms[highest]).abs() + (low.abs() - reach * norms[lowest]).abs()
        return STRETCH_WEIGHT["regularised"] * gaps.mean()


def _joined(observation: Observation) -> Tensor:
    """(2, T) mean and mean square of all channels of all layers."""
    means = torch.cat([m.mean for m in observation.moments])
    return torch.stack([means, torch.cat([m.second for m in observation.moments])])


def _warn_if_untrained(probe: BatchNormProbe, name: str) -> None:
    if all(bool((n.mean == 0).all()) and bool((n.variance == 1).all()) for n in probe.layers):
        _logger.warning(
            "the batch norms of %s hold the values they start with, so they remember no images: "
            "pass trained weights",
            name,
        )


def _belongs(key: str, index: int) -> bool:
    return key.startswith("optimizer.") and key.rpartition(".")[2] == str(index)


def fingerprint(model: LoadedModel, settings: SynthesisSettings) -> dict[str, Any]:
    """What decides the images; ``StateFile`` names the entries that differ."""
    own = {_SHOWN.get(key, f"--{key}"): value for key, value in asdict(settings).items()}
    own["version of the method"] = _VERSION
    size = (model.preprocessing.channels, *model.preprocessing.size)
    own["the network's code"] = hash_graph(capture_unfolded(model.module, size))
    return {**own, "weights": model.weights_sha256, "image preparation": model.preprocessing.to_dict()}
