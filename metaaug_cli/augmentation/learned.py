"""The learned augmenter over a run: built and warmed up once, taught before each block, saved after each."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from metaaug_cli.augmentation.augmenter import Augmenter, AugmenterSpec, augment, image_variance
from metaaug_cli.augmentation.bilevel import MetaSchedule
from metaaug_cli.augmentation.fixed import augmented_copies
from metaaug_cli.augmentation.meta import MetaHistory, MetaLearner
from metaaug_cli.augmentation.passes import Passes
from metaaug_cli.augmentation.warmup import WarmUp, warm_up
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData
from metaaug_cli.quantization.reconstruct import Schedule, Tick
from metaaug_cli.recipe.augment_kinds import NONE

SHOWN_IMAGES = 8
IDENTITY_SHARE = 0.02
LEAST_SIMILARITY = 0.5
# At the identity itself the margin's gradient is 0, and so is that of the mean squared preservation.
_WAY_OUT = "only the validation term leads away from there: give metaaug.val_weight a value"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copies:
    """T(D) for one block, and what was measured of it.

    Args:
        images: (K, C, H, W).
        distance: Mean (T(x) - x)^2 as a share of the images' variance.
        similarity: Mean cosine between the float network's features of x and T(x), both without their mean
            over the originals; 1 means that T changes nothing the network sees. With a single original
            nothing is left without the mean, which then stays.
        originals: (S, C, H, W), up to eight of the originals, to look at.
        changed: T of ``originals`` without the fixed operations.
    """

    images: Tensor
    distance: float
    similarity: float
    originals: Tensor
    changed: Tensor


def distance_note(distance: float, epsilon: float) -> str | None:
    """What to tell the user where T changes next to nothing."""
    if distance >= IDENTITY_SHARE * epsilon:
        return None
    return (
        f"the augmenter has collapsed to the identity (distance {distance:.2g}, epsilon {epsilon:.2g}); "
        + ("lower metaaug.preserve_weight or raise metaaug.margin_weight" if distance else _WAY_OUT)
    )


def similarity_note(similarity: float) -> str | None:
    """What to tell the user where T(x) is another image to the float network."""
    if similarity >= LEAST_SIMILARITY:
        return None
    return (
        f"the network hardly recognises the augmented images (feature similarity {similarity:.2f}, bound "
        f"{LEAST_SIMILARITY:.2f}); raise metaaug.preserve_weight, or lower metaaug.epsilon where the form is "
        "not policy"
    )


class LearnedAugmentation:
    """T, what teaches it, and the fixed operations on top of its images.

    Args:
        spec: The augmenter's form and bounds.
        schedule: Outer steps for each block.
        blocks: The chain's blocks, on the device.
        images: (N, C, H, W) calibration images, on the CPU.
        preprocessing: What normalised them.
        operations: Fixed operations on T(x), or "none".
        copies: Copies of each image where there are operations or T draws; else T gives one whatever this is.
        seed: Of T's initial weights and its warm-up.
        device: Where T lives.
    """

    def __init__(
        self,
        spec: AugmenterSpec,
        schedule: MetaSchedule,
        blocks: list[Block],
        images: Tensor,
        preprocessing: Preprocessing,
        *,
        operations: str,
        copies: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.images, self.preprocessing, self.operations, self.seed = images, preprocessing, operations, seed
        self.copies = copies
        self.warned: set[str] = set()
        self.variance = max(image_variance(images), 1e-12)
        height, width = images.shape[2:]
        self.augmenter = Augmenter(spec, preprocessing, (height, width), self.variance, seed=seed).to(device)
        self.augmenter.eval()
        passes = Passes(blocks)
        self.passes = passes
        self.views = passes.views(images, device)
        self.learner = MetaLearner(self.augmenter, passes, images, self.views, schedule)

    def warm_up(self, steps: int, tick: Tick | None = None) -> WarmUp | None:
        """Teach a ``unet`` to reproduce the images; the other forms make sensible images untaught."""
        if self.augmenter.spec.form != "unet":
            return None
        return warm_up(self.augmenter, self.images, steps=steps, seed=self.seed, tick=tick)

    def teach(
        self,
        block: Block,
        data: BlockData,
        inner: Schedule,
        *,
        generator: torch.Generator,
        tick: Tick | None = None,
    ) -> MetaHistory:
        """Let ``block`` teach T; see ``MetaLearner.learn``."""
        history = self.learner.learn(block, data, inner, generator=generator, tick=tick)
        if history.records:
            last = history.records[-1]
            _logger.info(
                "block %s: augmenter gradient norms of validation %.3g, margin %.3g, preservation %.3g; "
                "L_val %.4g -> %.4g by the inner step",
                block.name,
                *last.gradients,
                last.validation_before,
                last.validation,
            )
        return history

    def make(self, block: Block, generator: torch.Generator) -> Copies:
        """T of every image, with the fixed operations on top, and a warning where T went astray."""
        made = torch.cat([augment(self.augmenter, self.images, generator) for _ in range(self._passes())])
        first = made[: len(self.images)]
        distance = float((first - self.images).square().mean()) / self.variance
        similarity = self._similarity(first)
        self._warn("distance", block, distance_note(distance, self.augmenter.spec.epsilon))
        self._warn("similarity", block, similarity_note(similarity))
        if self.operations != NONE:
            each = self.copies if self._passes() == 1 else 1
            made = augmented_copies(made, self.preprocessing, self.operations, each, generator)
        shown = torch.linspace(0, len(self.images) - 1, min(len(self.images), SHOWN_IMAGES)).round().long()
        return Copies(made, distance, similarity, self.images[shown], first[shown])

    def _warn(self, what: str, block: Block, note: str | None) -> None:
        """A warning for the first block; later ones have the same cure, so they go to the log."""
        if note is None:
            return
        if what in self.warned:
            _logger.info("block %s: %s", block.name, note)
            return
        self.warned.add(what)
        _logger.warning("block %s: %s (named once; the log has later blocks)", block.name, note)

    def _passes(self) -> int:
        """Times that T walks the images: only the policy gives a different image each time."""
        return self.copies if self.augmenter.spec.form == "policy" else 1

    def _similarity(self, made: Tensor) -> float:
        centre = self.views.features.mean(0) if len(self.images) > 1 else 0.0
        changed = self.passes.views(made, self.views.features.device).features
        return float(torch.cosine_similarity(self.views.features - centre, changed - centre).mean())

    def state(self) -> dict[str, Tensor]:
        """T, its optimizer and its balance, flat: ``augmenter/…``, ``optimizer/INDEX/…``, ``balance/…``."""
        state = {f"augmenter/{name}": value for name, value in self.augmenter.network.state_dict().items()}
        for index, moments in self.learner.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
        state["balance/norms"] = self.learner.running_norms
        state["balance/steps"] = self.learner.balanced_steps.long()
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved ``state()``."""
        network = {k.removeprefix("augmenter/"): v for k, v in state.items() if k.startswith("augmenter/")}
        self.augmenter.network.load_state_dict(network)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                moments.setdefault(int(index), {})[key] = value
        current = self.learner.optimizer.state_dict()
        current["state"] = moments
        self.learner.optimizer.load_state_dict(current)
        self.learner.running_norms.copy_(state["balance/norms"])
        self.learner.balanced_steps.copy_(state["balance/steps"])
