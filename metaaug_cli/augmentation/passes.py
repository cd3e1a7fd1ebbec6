"""Passes through parts of the network that gradients may follow: prefixes for T(x), the float rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from metaaug_cli.graph.ops import WEIGHTED
from metaaug_cli.layout import fast_layout
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.quantization.cache import Values

_CHUNK = 64


@dataclass(frozen=True)
class Views:
    """What the float network says of some images: penultimate features (N, D) and logits (N, classes)."""

    features: Tensor
    logits: Tensor

    def of(self, indices: Tensor) -> Views:
        """The views of some of the images; ``indices`` on the CPU."""
        chosen = indices.to(self.features.device)
        return Views(self.features[chosen], self.logits[chosen])


class Passes:
    """The chain's blocks as functions of images or activations.

    Args:
        blocks: All blocks of the chain, in order.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.last = max(b.index for b in blocks if _last_layer(b.float_block) is not None)
        self.head = _with_features(blocks[self.last].float_block)

    def prefixes(self, images: Tensor, before: int) -> tuple[Values, Values]:
        """(full-precision, quantized) inputs of block ``before``; gradients reach the images."""
        h_fp: Values = (fast_layout(images),)
        h_q: Values = h_fp
        for block in self.blocks[:before]:
            h_fp, h_q = block.float_block(*h_fp), block.quantized_block(*h_q)
        return h_fp, h_q

    def rest(self, values: Values, start: int) -> Views:
        """Features and logits from the inputs of block ``start`` on, in full precision."""
        features: Tensor | None = None
        for block in self.blocks[start:]:
            if block.index == self.last:
                *outputs, features = self.head(*values)
                values = tuple(outputs)
            else:
                values = block.float_block(*values)
        logits = values[0]
        return Views((logits if features is None else features).flatten(1), logits)

    @torch.no_grad()
    def views(self, images: Tensor, device: torch.device) -> Views:
        """Views of all images (N, C, H, W), kept on ``device``."""
        parts = [self.rest((fast_layout(part.to(device)),), 0) for part in images.split(_CHUNK)]
        return Views(torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts]))


def _last_layer(block: fx.GraphModule) -> fx.Node | None:
    layers = [n for n in block.graph.nodes if n.target in WEIGHTED]
    return layers[-1] if layers else None


def _with_features(block: fx.GraphModule) -> fx.GraphModule:
    """The block with one more output: the input of its last layer."""
    extended = fx.GraphModule(block, copy.deepcopy(block.graph))
    layer = _last_layer(extended)
    assert layer is not None
    output = next(n for n in extended.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], layer.args[0]),)
    extended.recompile()
    return extended
