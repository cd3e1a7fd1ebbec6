"""What a network's batch norms remember of its training images, beside what they see of other images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from metaaug_cli.errors import InputError
from metaaug_cli.graph.capture import capture_unfolded
from metaaug_cli.graph.graph_tools import attribute
from metaaug_cli.graph.normalize import BATCH_NORMS, batch_norm_epsilon, drop_assertions, fold_constants
from metaaug_cli.graph.ops import CONVOLUTIONS, PASSTHROUGH, WEIGHTED
from metaaug_cli.layout import fast_layout

aten = torch.ops.aten

_OTHER_NORMS = {
    aten.layer_norm.default: "layer",
    aten.native_layer_norm.default: "layer",
    aten.group_norm.default: "group",
    aten.native_group_norm.default: "group",
    aten.instance_norm.default: "instance",
}
# What may stand between the last layer and the logits: it moves or keeps values.
_KEEPS_VALUES = PASSTHROUGH | {
    aten.flatten.using_ints,
    aten.dropout.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
}
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class BatchNormLayer:
    """One batch norm and the statistics it stored while the network was trained.

    Args:
        name: Path of its module in the user's network, e.g. ``layer1.0.bn1``.
        mean: (C,) running mean.
        variance: (C,) running variance.
        epsilon: What it adds to the variance before it divides by the root.
    """

    name: str
    mean: Tensor
    variance: Tensor
    epsilon: float


@dataclass(frozen=True)
class Moments:
    """First and second moment of one batch norm's input.

    Args:
        mean: (C,) over images and positions.
        second: (C,) mean square, likewise.
    """

    mean: Tensor
    second: Tensor

    @property
    def std(self) -> Tensor:
        """(C,) standard deviation; its gradient is finite where a channel is constant."""
        return (self.second - self.mean.square()).clamp(min=_LEAST_VARIANCE).sqrt()


@dataclass(frozen=True)
class Observation:
    """What one batch makes the network compute.

    Args:
        moments: One entry per batch norm, in the order of ``BatchNormProbe.layers``.
        outputs: The network's output, (N, classes) for a classifier.
        features: (N, F) input of the last layer; None where that is not one vector an image.
    """

    moments: list[Moments]
    outputs: Tensor
    features: Tensor | None


class BatchNormProbe:
    """A network that also gives the statistics of every batch norm's input, differentiably.

    Attributes:
        layers: The batch norms in execution order.
        classifier_weight: (classes, F) weight of the last layer; None where ``features`` would be None.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target in BATCH_NORMS]
        if not nodes:
            raise _no_batch_norms(module)
        self.layers = _layers(module, nodes)
        for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default  # a view depends on how activations lie in memory
        fold_constants(module)  # its factories and assertions name the device it was traced on
        drop_assertions(module)
        output = next(n for n in module.graph.nodes if n.op == "output")
        (result,) = output.all_input_nodes
        last = _classifier(result)
        self.classifier_weight = None if last is None else attribute(module, last.args[1]).flatten(1)  # type: ignore[arg-type]
        features = () if last is None else (last.args[0],)
        output.args = ((result, tuple(n.args[0] for n in nodes), features),)
        module.recompile()
        self.module = module

    def __call__(self, images: Tensor) -> Observation:
        """Run one batch.

        Args:
            images: Normalised (N, C, H, W), on the device the probe is on.
        """
        outputs, inputs, features = self.module(fast_layout(images))
        moments = [_moments(x) for x in inputs]
        return Observation(moments, outputs.float(), features[0].float().flatten(1) if features else None)

    def to(self, device: torch.device) -> BatchNormProbe:
        """Move the network and the stored statistics."""
        self.module.to(device)
        self.layers = [
            replace(n, mean=n.mean.to(device), variance=n.variance.to(device)) for n in self.layers
        ]
        if self.classifier_weight is not None:
            self.classifier_weight = self.classifier_weight.to(device)
        return self


def batch_norm_probe(
    network: nn.Module | ExportedProgram, input_size: tuple[int, int, int]
) -> BatchNormProbe:
    """Find a network's batch norms.

    Args:
        network: An eval-mode module, or a program loaded from a ``.pt2`` file.
        input_size: (C, H, W) of the images it takes.

    Raises:
        InputError: It has no batch norms.
        GraphError: It cannot be captured.
    """
    return BatchNormProbe(capture_unfolded(network, input_size))


def _moments(x: Tensor) -> Moments:
    """Per-channel moments of (N, C, …), in float32 whatever precision computed it."""
    return Moments(*_ChannelMoments.apply(x.float()))


class _ChannelMoments(torch.autograd.Function):
    """Mean and mean square per channel; the gradient takes one pass over memory and keeps the layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        return x.mean(axes), x.square().mean(axes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_second: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        per_channel = (1, -1, *[1] * (x.dim() - 2))
        values = x.numel() / x.shape[1]
        return torch.addcmul(
            (to_mean / values).view(per_channel), x, (2.0 * to_second / values).view(per_channel)
        )


def _layers(module: fx.GraphModule, nodes: list[fx.Node]) -> list[BatchNormLayer]:
    layers: list[BatchNormLayer] = []
    seen: dict[str, int] = {}
    for node in nodes:
        mean, variance = node.args[3:5]
        assert isinstance(mean, fx.Node)
        assert isinstance(variance, fx.Node)
        name = str(mean.target).rpartition(".")[0] or str(mean.target)
        count = seen[name] = seen.get(name, 0) + 1
        unique = name if count == 1 else f"{name}_use{count}"
        stored = attribute(module, mean), attribute(module, variance)
        layers.append(BatchNormLayer(unique, *stored, batch_norm_epsilon(node)))
    return layers


def _classifier(result: fx.Node) -> fx.Node | None:
    """The last layer, where the output comes straight from it and it reads one vector an image."""
    node = result
    while node.op == "call_function" and node.target in _KEEPS_VALUES:
        node = node.all_input_nodes[0]
    if node.op != "call_function" or node.target not in WEIGHTED:
        return None
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return node if all(side == 1 for side in x.meta["val"].shape[2:]) else None


def _no_batch_norms(module: fx.GraphModule) -> InputError:
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    if aten._native_batch_norm_legit.no_stats in targets:
        return InputError(
            "the network's batch norms store nothing of its training images (track_running_stats=False)",
            hint="use real images: --images DIR here, or --calib DIR in metaaug quantize",
        )
    others = sorted({_OTHER_NORMS[t] for t in targets if t in _OTHER_NORMS})
    if others:
        reason = f"it uses {' and '.join(others)} norms, which store nothing about the training images"
        remedy = "use real images: --images DIR here, or --calib DIR in metaaug quantize"
    elif any(t in CONVOLUTIONS for t in targets):
        reason = "they may be folded into its convolutions already"
        remedy = "pass the network as it was trained, with its batch norms; or use real images (--images DIR)"
    else:
        reason = "and nothing else in it remembers the training images"
        remedy = "use real images: --images DIR here, or --calib DIR in metaaug quantize"
    return InputError(f"the network has no batch norms: {reason}", hint=remedy)
