"""The learned augmenter in the run directory: its state, curves and images per block, and a page of them all.

``augmentation/NNN-NAME.safetensors`` (T, its optimizer, what balances the terms), ``.json`` (the outer
steps), ``.png`` (originals above T(x)) and ``index.html``. Every write replaces the file in one step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from metaaug_cli.augmentation.learned import Copies, LearnedAugmentation
from metaaug_cli.augmentation.meta import MetaHistory, MetaRecord
from metaaug_cli.errors import InputError
from metaaug_cli.files import write_atomically
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.runs.artifacts import AUGMENTATION, RunDirectory, read_state
from metaaug_cli.runs.augmentation_page import BlockView, Taught, augmentation_page
from metaaug_cli.runs.augmentation_sheet import sheet_png

PAGE = "index.html"
_logger = logging.getLogger(__name__)


class AugmentationFiles:
    """The ``augmentation/`` folder of one run.

    Args:
        directory: The run's, already started.
        names: Of all blocks of the chain, in order.
    """

    def __init__(self, directory: RunDirectory, names: Sequence[str]) -> None:
        self.directory, self.names = directory, list(names)
        self.folder = directory.path / AUGMENTATION

    def path(self, index: int, name: str, suffix: str = ".safetensors") -> Path:
        """File of T after a block (``.safetensors``), its curves (``.json``) or its images (``.png``)."""
        return self.folder / self.directory.block_path(index, name, suffix).name

    def save(self, block: Block, learned: LearnedAugmentation, meta: MetaHistory, copies: Copies) -> None:
        """Write T, its images and what ``block`` taught it; the block itself is not done yet."""
        self.folder.mkdir(exist_ok=True)
        sheet = sheet_png(copies.originals, copies.changed, learned.preprocessing, learned.variance)
        content = {
            "distance": copies.distance,
            "similarity": copies.similarity,
            "epsilon": learned.augmenter.spec.epsilon,
            "variance": learned.variance,
            **asdict(meta),
        }
        write_atomically(self.path(block.index, block.name), save(learned.state()))
        write_atomically(self.path(block.index, block.name, ".png"), sheet)
        write_atomically(self.path(block.index, block.name, ".json"), json.dumps(content))

    def load(self, block: Block, learned: LearnedAugmentation) -> None:
        """Take over T as it was after ``block``, where that block taught it.

        Raises:
            InputError: The file cannot be read, or is another augmenter's.
        """
        if block.is_edge:
            return
        path = self.path(block.index, block.name)
        try:
            learned.load(read_state(path))
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} does not hold this run's augmenter: {str(error).splitlines()[0]}",
                hint="delete it and continue with --resume: its block is then learned again",
            ) from None

    def write_page(self) -> None:
        """Write ``index.html`` anew from the files of all finished blocks."""
        self.folder.mkdir(exist_ok=True)
        views = [self._view(index, name) for index, name in enumerate(self.names)]
        finished = [view for view in views if view is not None]
        write_atomically(self.folder / PAGE, augmentation_page(finished, len(self.names)))

    def _view(self, index: int, name: str) -> BlockView | None:
        history = _read_json(self.directory.block_path(index, name, ".json"))
        if history is None:
            return None
        taught = self._taught(index, name) if history.get("augmentation") else None
        return BlockView(name, history.get("losses", {}), taught)

    def _taught(self, index: int, name: str) -> Taught | None:
        content = _read_json(self.path(index, name, ".json"))
        try:
            sheet = self.path(index, name, ".png").read_bytes()
            if content is None:
                return None
            return Taught(
                records=[MetaRecord(**record) for record in content["records"]],
                sheet=sheet,
                **{key: content[key] for key in ("distance", "similarity", "epsilon", "variance")},
            )
        except (OSError, KeyError, TypeError) as error:
            _logger.warning("block %s is not shown in %s: %s", name, PAGE, error)
            return None


def _read_json(path: Path) -> dict[str, Any] | None:
    """A file's object; None where it is missing or damaged, because a page is no reason to stop a run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
