"""How far a set of images is from a network's training images, in the statistics its batch norms stored.

A channel's distance is the shift of its mean in stored standard deviations together with half the logarithm
of the ratio of the variances (the two coordinates of a Gaussian); a layer's is the root mean square over
its channels, the whole network's over its layers. What a limited number of images adds by chance alone
is estimated from the differences between the images and taken off, so that 32 images and 1 024 read alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from metaaug_cli.errors import InputError
from metaaug_cli.graph.bn_statistics import BatchNormLayer, BatchNormProbe

_FLOOR = 0.01
_GROUPS = 16
_PIXELS_AT_ONCE = 1 << 19
_LARGEST_BATCH = 64
_TINY = 1e-20


@dataclass(frozen=True)
class SetStatistics:
    """Moments of every batch norm's input, for each image of a set.

    Args:
        means: (N, C) per layer, the mean over positions.
        seconds: (N, C) per layer, the mean square over positions.
        outputs: What the network gave, (N, ...); (N, 0) where it was not run to its end.
    """

    means: list[Tensor]
    seconds: list[Tensor]
    outputs: Tensor

    def __len__(self) -> int:
        return len(self.outputs)

    def of(self, indices: Tensor) -> SetStatistics:
        """The statistics of some of the images."""
        return SetStatistics(
            [mean[indices] for mean in self.means],
            [second[indices] for second in self.seconds],
            self.outputs[indices],
        )


@dataclass(frozen=True)
class Distances:
    """A distance per layer and for all; squares can be negative where chance explains more than is there.

    Args:
        squared: (L,) squared distance of each layer.
        jackknife: (G, L) the same without each of G groups of images; ``None`` from ``distance_between``.
    """

    squared: Tensor
    jackknife: Tensor | None = None

    @property
    def layers(self) -> list[float]:
        """Each layer's distance, in stored standard deviations."""
        return [float(value) for value in self.squared.clamp(min=0).sqrt()]

    @property
    def overall(self) -> float:
        """Root mean square over the layers."""
        return float(self.squared.mean().clamp(min=0).sqrt())


@torch.no_grad()
def collect(
    module: fx.GraphModule, images: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> SetStatistics:
    """Run images through a network and keep each one's batch-norm moments.

    Args:
        module: A probe's, or what ``until`` made of one.
        images: Normalised (N, C, H, W).
        progress: Called with (images done, N).

    Raises:
        InputError: The network computes NaN or infinite values of them.
    """
    size = min(max(_PIXELS_AT_ONCE // images[0, 0].numel(), 1), _LARGEST_BATCH)
    means: list[list[Tensor]] = []
    seconds: list[list[Tensor]] = []
    outputs: list[Tensor] = []
    done = 0
    for batch in images.split(size):
        output, inputs, _ = module(batch)
        flat = [_positions_last(x.float(), len(batch)) for x in inputs]
        means.append([x.mean(2) for x in flat])
        seconds.append([x.square().mean(2) for x in flat])
        outputs.append(output.float() if output is not None else torch.empty(len(batch), 0))
        done += len(batch)
        if progress is not None:
            progress(done, len(images))
    found = SetStatistics(_joined(means), _joined(seconds), torch.cat(outputs))
    if not all(bool(layer.isfinite().all()) for layer in (*found.seconds, found.outputs)):
        raise InputError(
            "the network computes NaN or infinite values of these images",
            hint="their pixels may be far out of range: metaaug calibrate inspect SET, without --model",
        )
    return found


def _positions_last(x: Tensor, images: int) -> Tensor:
    """A batch norm's input as (N, C, positions), also where it has the tokens of all images as its rows."""
    if x.dim() > 2:
        return x.flatten(2)
    return x.view(images, -1, x.shape[1]).mT


def until(probe: BatchNormProbe, count: int) -> fx.GraphModule:
    """The network up to its first batch norms, computing nothing behind them; see ``collect``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(probe.module.graph, {}))
    output = next(node for node in graph.nodes if node.op == "output")
    _, inputs, _ = output.args[0]
    output.args = ((None, tuple(inputs[:count]), ()),)
    graph.eliminate_dead_code()
    return fx.GraphModule(probe.module, graph)


def distance_to_stored(statistics: SetStatistics, layers: Sequence[BatchNormLayer]) -> Distances:
    """How far a set is from what the batch norms stored, chance taken off.

    Args:
        statistics: Of the set; for the first layers only, or for all.
        layers: What the network stored, at least as many.
    """
    squared, left_out = [], []
    groups = _groups(len(statistics))
    for mean, second, layer in zip(statistics.means, statistics.seconds, layers, strict=False):
        floor = _floor(layer)
        scale = layer.variance + floor
        m, q = mean.mean(0), second.mean(0)
        noise = _noise(mean, second, scale, floor)
        squared.append((_squares(m, q, layer.mean, scale, floor) - noise).mean())
        rest = groups @ mean, groups @ second
        left_out.append((_squares(*rest, layer.mean, scale, floor) - noise).mean(1))
    return Distances(torch.stack(squared), torch.stack(left_out, 1))


def distance_between(a: SetStatistics, b: SetStatistics, layers: Sequence[BatchNormLayer]) -> Distances:
    """How far two sets are apart, in stored standard deviations; chance is not taken off.

    Args:
        a: One set.
        b: The other.
        layers: What the network stored; gives the unit.
    """
    squared = []
    for index, layer in enumerate(layers):
        floor = _floor(layer)
        scale = layer.variance + floor
        (ma, va), (mb, vb) = (_moments(s.means[index], s.seconds[index]) for s in (a, b))
        spread = 0.5 * torch.log((va + floor) / (vb + floor))
        squared.append(((ma - mb).square() / scale + spread.square()).mean())
    return Distances(torch.stack(squared))


def standard_error(jackknife: Tensor) -> float:
    """Standard error of a quantity from its values (G,) with one of G groups left out (Efron 1979)."""
    count = len(jackknife)
    if count < 2:
        return float("inf")
    return float(((jackknife - jackknife.mean()).square().sum() * (count - 1) / count).sqrt())


def _joined(batches: list[list[Tensor]]) -> list[Tensor]:
    """One tensor per layer from one list of layers per batch."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _groups(count: int) -> Tensor:
    """(G, N) weights that average all images but those of one group."""
    groups = min(_GROUPS, count)
    kept = torch.arange(count)[None] % groups != torch.arange(groups)[:, None]
    return kept / kept.sum(1, keepdim=True).clamp(min=1)


def _floor(layer: BatchNormLayer) -> Tensor:
    # Channels that hardly vary carry rounding, not images; the layer's own scale keeps them quiet.
    return _FLOOR * layer.variance.mean() + _TINY


def _squares(m: Tensor, q: Tensor, stored: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    variance = (q - m.square()).clamp(min=0) + floor
    return (m - stored).square() / scale + (0.5 * torch.log(variance / scale)).square()


def _noise(mean: Tensor, second: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    """Expected square that chance adds per channel: variances of the mean and, linearised, of the log."""
    count = len(mean)
    if count < 2:
        return torch.zeros_like(scale)
    m, variance = _moments(mean, second)
    influence = second - 2 * m * mean
    of_log = influence.var(0) / (4 * (variance + floor).square())
    return (mean.var(0) / scale + of_log) / count


def _moments(mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    m = mean.mean(0)
    return m, (second.mean(0) - m.square()).clamp(min=0)
