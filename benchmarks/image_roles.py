"""Which use of made images costs accuracy: ``python benchmarks/image_roles.py``.

MobileNet-V1, W4A4, 60 iterations, seed 0: 64 real images and 64 that started from plain noise walk the
network side by side; scales are searched on one kind, blocks learned on one kind. Prints the top-1 in
ONNX Runtime and every block's error on both kinds.
"""

from __future__ import annotations

from itertools import product
from unittest.mock import patch

import torch
from common import Subject, mobilenet, onnx_scores
from data_free import stored_set
from torch import Tensor

from metaaug_cli import pipeline
from metaaug_cli.calibration.data import join_calibration_sets, load_calibration_set
from metaaug_cli.memory import keep_freed_memory
from metaaug_cli.quantization.blocks import Block, search_activation_scales
from metaaug_cli.quantization.cache import BlockData, Values
from metaaug_cli.quantization.reconstruct import probe_loss
from metaaug_cli.quantization.walk import Walker
from metaaug_cli.recipe.config import Recipe

_COUNT = 64
_FIRST = {"real": 0, "made": _COUNT}
_SETTINGS = [
    f"calibration.num={2 * _COUNT}",
    "quantization.weight_bits=4",
    "quantization.act_bits=4",
    "reconstruction.iterations=60",
    "reconstruction.start=nearest",  # the search below takes the place of what this start calls
    "augmentation.kind=none",
]


def rows(kind: str) -> Tensor:
    """Indices of one kind of image."""
    return torch.arange(_COUNT) + _FIRST[kind]


def measure(subject: Subject, scales: str, learned: str) -> None:
    """One run with the two uses kept apart."""
    real = load_calibration_set(subject.calib, preprocessing=subject.model.preprocessing, num=_COUNT, seed=0)
    made = load_calibration_set(stored_set(subject, "dgh from plain noise", _COUNT, 0))
    seen: list[BlockData] = []

    def draw(_: BlockData, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(_COUNT, (count,), generator=generator) + _FIRST[learned]

    def search(block: Block, _: Values) -> None:
        search_activation_scales(block, seen[-1].quantized_stream.batch(rows(scales)))

    def enter(walker: Walker, block: Block, *, learns: bool) -> BlockData:
        seen.append(original(walker, block, learns=learns))
        return seen[-1]

    def losses(_: object, block: Block, data: BlockData) -> dict[str, float]:
        return {kind: probe_loss(block, data, rows(kind)) for kind in _FIRST}

    original = Walker.enter
    with (
        patch.object(BlockData, "draw", draw),
        patch.object(pipeline, "search_activation_scales", search),
        patch.object(Walker, "enter", enter),
        patch.object(pipeline._Run, "_losses", losses),
    ):
        joined = join_calibration_sets(real, made)
        result = pipeline.quantize(subject.model, joined, recipe=Recipe().override(_SETTINGS))
    print(f"scales from {scales}, learned on {learned}: {onnx_scores(subject, result)}", flush=True)
    for block, history in zip(result.chain.blocks, result.histories, strict=True):
        errors = ", ".join(f"{kind} {error:.4g}" for kind, error in history.losses.items())
        print(f"    {block.name}: {errors}", flush=True)


def main() -> None:
    """All four combinations."""
    torch.set_num_threads(1)
    keep_freed_memory()
    subject = mobilenet()
    for scales, learned in product(_FIRST, _FIRST):
        measure(subject, scales, learned)


if __name__ == "__main__":
    main()
