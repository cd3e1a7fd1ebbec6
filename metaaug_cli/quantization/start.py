"""What a block starts from: its activation scales searched and, on request, its weights rounded by GPTQ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from metaaug_cli.graph.ops import WEIGHTED
from metaaug_cli.quantization.blocks import Block, ScaleSearch
from metaaug_cli.quantization.quantizers import CONTAINER_BITS, WeightQuantizer
from metaaug_cli.quantization.second_order import (
    POWERS_OF_TWO,
    SCALE_FACTORS,
    compensated_codes,
    corrected_weight,
)

_PATCHES = 16_384
_LARGEST_PATCH = 8_192
_LARGEST_CHUNK = 1 << 24

_logger = logging.getLogger(__name__)


@torch.no_grad()
def start_second_order(
    block: Block, quantized: Sequence[Tensor], full_precision: Sequence[Tensor] | None, seed: int
) -> None:
    """Search the block's activation scales and round its weights in execution order, on one set of inputs.

    Args:
        block: Its quantizers are updated in place; learning may go on from there.
        quantized: The block's inputs (N, …) as the quantized blocks before it give them.
        full_precision: The same inputs in full precision. With them, weights also make up for what was
            lost before their layer (``corrected_weight``): best where nothing is learned afterwards. Blocks
            that are learned start better without.
        seed: Chooses the input patches that are looked at.
    """
    wanted: dict[int, Tensor] = {}
    if full_precision is not None:
        recorder = _Patches(block.float_block, seed)
        recorder.run(*full_precision)
        wanted = recorder.patches
    _Start(block.quantized_block, seed, wanted).run(*quantized)


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer, as a matrix on patches of its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, args: Sequence[Any]) -> _Layer:
        """From a node's arguments (input, weight, bias, stride, padding, dilation, groups)."""
        kernel = tuple(args[1].shape[2:])
        stride, padding, dilation = (
            tuple(args[i]) if len(args) > i else (default,) * len(kernel)
            for i, default in ((3, 1), (4, 0), (5, 1))
        )
        one_row = len(kernel) == 1  # a 1-D convolution is a 2-D one with a height of 1
        return cls(
            (1, *kernel) if one_row else kernel,
            (1, *stride) if one_row else stride,
            (0, *padding) if one_row else padding,
            (1, *dilation) if one_row else dilation,
            args[6] if len(args) > 6 else 1,
        )

    def patches(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(groups, n, k): up to some 16 384 of the patches that the layer sees of ``x``, drawn at random."""
        if not self.kernel:
            return _drawn(x, _PATCHES, generator)[None]
        if x.dim() == 3:
            x = x.unsqueeze(2)
        chunk = max(1, _LARGEST_CHUNK // (x[0].numel() * self.kernel[0] * self.kernel[1]))
        each = -(-_PATCHES // len(x))
        parts = [_drawn(self._unfold(part), each * len(part), generator) for part in x.split(chunk)]
        rows = torch.cat(parts)
        return rows.view(len(rows), self.groups, -1).transpose(0, 1)

    def _unfold(self, x: Tensor) -> Tensor:
        if self.kernel == (1, 1) and not any(self.padding):
            return x[:, :, :: self.stride[0], :: self.stride[1]].movedim(1, -1).flatten(0, 2)
        unfolded = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        return unfolded.transpose(1, 2).flatten(0, 1)


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]


class _Patches(fx.Interpreter):
    """Runs a float block and keeps the patches that each layer sees, by the layer's number."""

    def __init__(self, module: fx.GraphModule, seed: int) -> None:
        super().__init__(module)
        self.seed = seed
        self.patches: dict[int, Tensor] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in WEIGHTED:
            number = len(self.patches)
            self.patches[number] = _Layer.of(args).patches(args[0], _generator(self.seed, number))
        return super().call_function(target, args, kwargs)


class _Start(ScaleSearch):
    """Runs a quantized block; every layer is rounded just before it is computed."""

    def __init__(self, module: fx.GraphModule, seed: int, wanted: dict[int, Tensor]) -> None:
        super().__init__(module)
        self.seed, self.wanted, self.number = seed, wanted, 0

    def run_node(self, n: fx.Node) -> Any:
        if n.target in WEIGHTED:
            source = n.args[1]
            assert isinstance(source, fx.Node)
            quantizer = self.module.get_submodule(source.target) if source.op == "call_module" else None  # type: ignore[arg-type]
            if isinstance(quantizer, WeightQuantizer):
                self._round(n, quantizer)
                self.env[source] = quantizer()
            self.number += 1
        return super().run_node(n)

    def _round(self, node: fx.Node, quantizer: WeightQuantizer) -> None:
        args: Sequence[Any] = self.map_nodes_to_values(node.args, node)  # type: ignore[assignment]
        layer, weight = _Layer.of(args), quantizer.weight()
        k = weight[0].numel()
        if k > _LARGEST_PATCH:
            _logger.info("%s keeps nearest rounding: %d weights per output are too many", node.name, k)
            return
        seen = layer.patches(args[0], _generator(self.seed, self.number))
        grouped = weight.view(layer.groups, -1, k)
        hessian = seen.mT @ seen
        if not bool(hessian.isfinite().all()):  # whose fault that is, the block's losses tell
            _logger.info("%s keeps nearest rounding: its inputs are not finite or too large", node.name)
            return
        wanted = grouped
        if self.wanted:
            wanted = corrected_weight(grouped, hessian, self.wanted.pop(self.number).mT @ seen)
        codes, scale = compensated_codes(
            wanted,
            hessian,
            quantizer.base_scale.view(layer.groups, -1),
            quantizer.zero_point.view(layer.groups, -1),
            quantizer.bits,
            factors=_factors(quantizer),
        )
        quantizer.start_at(codes.view_as(weight), scale.flatten(), wanted.reshape(weight.shape))


def _factors(quantizer: WeightQuantizer) -> tuple[float, ...]:
    if quantizer.bits >= CONTAINER_BITS:
        return (1.0,)
    return POWERS_OF_TWO if quantizer.power_of_two else SCALE_FACTORS


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_009 + layer) % 2**63)
