"""The slow way to a set's batch-norm statistics, which the package's ways are compared with."""

import torch
from torch import Tensor

from metaaug_cli.graph.bn_statistics import BatchNormLayer, BatchNormProbe, Moments


@torch.no_grad()
def set_moments(probe: BatchNormProbe, images: Tensor, batch_size: int = 64) -> list[Moments]:
    """Mean and second moment of every batch norm's input over a whole set, one entry per batch norm."""
    parts = [(len(batch), probe(batch).moments) for batch in images.split(batch_size)]
    return [
        Moments(
            sum(count * moments[layer].mean for count, moments in parts) / len(images),
            sum(count * moments[layer].second for count, moments in parts) / len(images),
        )
        for layer in range(len(probe.layers))
    ]


def moment_distance(moments: Moments, layer: BatchNormLayer) -> Tensor:
    """Squared distance of mean and standard deviation to the stored ones in the batch norm's unit; ()."""
    gaps = (moments.mean - layer.mean) ** 2 + (moments.std - layer.variance**0.5) ** 2
    return (gaps / (layer.variance + layer.epsilon)).mean()
