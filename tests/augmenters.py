"""A learned augmenter on the small residual network, for the tests of what teaches it and what it leaves."""

import torch
from networks import SIZE, family, images, searched
from torch import Tensor

from metaaug_cli.augmentation.augmenter import AugmenterSpec
from metaaug_cli.augmentation.bilevel import MetaSchedule
from metaaug_cli.augmentation.learned import LearnedAugmentation
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import BlockData, Stream
from metaaug_cli.quantization.reconstruct import Schedule

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.5,) * 3)
PICTURES = images(12).clamp(-1, 1)
INNER = Schedule(iterations=10, rate_factor=25.0)


def learned_augmentation(
    form: str = "residual",
    *,
    operations: str = "none",
    copies: int = 3,
    spec: dict[str, object] | None = None,
    pictures: Tensor = PICTURES,
    **schedule: object,
) -> LearnedAugmentation:
    """T over a new chain of the network, scales searched; ``schedule`` are fields of ``MetaSchedule``."""
    fields = {"steps": 3, "batch_size": 4, "val_batch_size": 6, "lr": 1e-3, "inner": "sgd", "balanced": True}
    chain = searched(family("residual"))
    return LearnedAugmentation(
        AugmenterSpec(**{"form": form, "base_width": 4} | (spec or {})),
        MetaSchedule(**fields | schedule),
        chain.blocks,
        pictures,
        PREPROCESSING,
        operations=operations,
        copies=copies,
        seed=0,
        device=CPU,
    )


def data_of(learned: LearnedAugmentation, index: int) -> tuple[Block, BlockData]:
    """A block of the augmenter's chain and its inputs for the pictures."""
    block = learned.passes.blocks[index]
    with torch.no_grad():
        h_fp, h_q = learned.passes.prefixes(PICTURES, index)
    return block, BlockData(Stream(h_fp, CPU), Stream(h_q, CPU), block.float_block, None, block.computed)


def teach(learned: LearnedAugmentation, index: int = 1, seed: int = 0):
    block, data = data_of(learned, index)
    return learned.teach(block, data, INNER, generator=torch.Generator().manual_seed(seed))
