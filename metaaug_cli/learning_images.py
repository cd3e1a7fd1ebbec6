"""The images a run learns from: the user's, images made from the network beside them, and fixed copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metaaug_cli.augmentation.fixed import augmented_copies
from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.errors import InputError, RecipeError
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.prepare import augmentation_kind, copies_of
from metaaug_cli.recipe.augment_kinds import NONE, learned_part
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.synthesis.cache import cached_synthetic_set
from metaaug_cli.synthesis.dgh import SynthesisSettings


class Progress(Protocol):
    """What a caller may want to show while images are made."""

    def making_images(self, done: int, total: int, text: str) -> None:
        """One step of the synthesis is done; ``text`` says how well it goes."""

    def made_images(self, count: int) -> None:
        """All ``count`` images are there."""


@dataclass(frozen=True)
class LearningImages:
    """What the blocks are learned from and measured on.

    Args:
        originals: (N, C, H, W) real images that are learned from, then those made from the network.
        held_back: (M, C, H, W) real images that nothing is learned from.
        preprocessing: Of all of them.
        holds_synthetic: Whether some of the originals were made from a network.
    """

    originals: Tensor
    held_back: Tensor
    preprocessing: Preprocessing
    holds_synthetic: bool

    def with_copies(self, recipe: Recipe) -> Tensor:
        """The originals, followed by the recipe's fixed copies of them where no augmenter is learned."""
        is_learned, operations = learned_part(augmentation_kind(recipe))
        if is_learned or operations == NONE:
            return self.originals
        generator = torch.Generator().manual_seed(recipe.seed)
        copies = copies_of(recipe, len(self.originals))
        made = augmented_copies(self.originals, self.preprocessing, operations, copies, generator)
        return torch.cat([self.originals, made])


def gather_images(
    model: LoadedModel,
    calibration: CalibrationSet,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
) -> LearningImages:
    """Hold back what the recipe says, and make the images it wants beside the rest.

    Raises:
        InputError: Images are to be made from a network without batch norms, or stand beside images that
            were prepared otherwise.
    """
    images, held_back = _split(calibration, recipe)
    settings = synthesis_of(recipe)
    if settings is not None:
        differences = calibration.preprocessing.differences(model.preprocessing)
        if differences:
            raise InputError(
                "images made from the model do not belong beside a calibration set that was prepared "
                f"otherwise ({'; '.join(differences)})",
                hint="prepare the images for this model, or leave --synthetic out (calibration.synthetic: 0)",
            )
        try:
            made = cached_synthetic_set(model, settings, device=device, tick=progress.making_images)
        except InputError as error:
            raise InputError(
                error.message, hint="leave --synthetic out (calibration.synthetic: 0)"
            ) from error
        progress.made_images(settings.num)
        images = torch.cat([images, made.images])
    holds_synthetic = calibration.holds_synthetic or settings is not None
    return LearningImages(images, held_back, calibration.preprocessing, holds_synthetic)


def synthesis_of(recipe: Recipe) -> SynthesisSettings | None:
    """How the recipe's synthetic images are made; None where it wants none."""
    count = recipe.calibration.synthetic
    return SynthesisSettings(num=count, seed=recipe.seed) if count else None


def _split(calibration: CalibrationSet, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Images to learn from, and those the recipe holds back, which are real ones."""
    images, count = calibration.images, recipe.calibration.holdout
    if count == 0:
        return images, images[:0]
    real = calibration.is_real.nonzero().flatten()
    if count > len(real):
        raise RecipeError(
            f"calibration.holdout: {count} images are to be held back and {len(real)} of the set are real",
            hint="hold back fewer: only real images tell how far a block overfits",
        )
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(recipe.seed))
    held_back = torch.zeros(len(images), dtype=torch.bool)
    held_back[real[order[:count]]] = True
    return images[~held_back], images[held_back]
