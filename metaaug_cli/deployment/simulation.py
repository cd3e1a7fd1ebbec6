"""Run a deployed network in PyTorch exactly as integer hardware does.

Multiplying dequantized floats, as the deployed graph is written, gives the right values up to the last bits
of float32. That is not enough: a sum that lies on the border of two codes comes out on either side, always
the same way for one channel, and at 4 bits and below one such border changes predictions. Here the
convolutions and linear layers sum integer codes exactly, and sums become codes by one float32
multiplication, as integer kernels do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from metaaug_cli.deployment import integer_ops as ops
from metaaug_cli.deployment.integer_ops import Codes, Pending, as_tensor
from metaaug_cli.deployment.onnx_view import SCALE

CodeHook = Callable[[str, Tensor, Tensor], Tensor]
"""(quantizer name, codes, steps before rounding) to the codes to go on with."""


class IntegerSimulation(nn.Module):
    """A deployed network whose forward computes in integers.

    Args:
        deployed: Graph of the operators in ``qdq_ops`` and ATen ones.
    """

    def __init__(self, deployed: fx.GraphModule) -> None:
        super().__init__()
        self.deployed = deployed

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images (N, C, H, W)."""
        return run_integers(self.deployed, images)


def run_integers(deployed: fx.GraphModule, images: Tensor, hook: CodeHook | None = None) -> Tensor:
    """Logits of a deployed graph, computed in integers.

    Args:
        deployed: The graph.
        images: Normalised images (N, C, H, W).
        hook: Sees the codes of every quantizer and may replace them.
    """
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        return as_tensor(_IntegerInterpreter(deployed, hook).run(images))


class _IntegerInterpreter(fx.Interpreter):
    def __init__(self, deployed: fx.GraphModule, hook: CodeHook | None) -> None:
        super().__init__(deployed)
        self._hook = hook
        self._uses: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target is torch.ops.metaaug.fake_quantize.default:
            return self._quantize(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = ops.HANDLERS.get(target)
        result = None if handler is None else handler(*args, **kwargs)
        if result is not None:
            return result
        if target in ops.MOVES and isinstance(args[0], Codes):
            moved = target(args[0].codes, *args[1:], **kwargs)
            return ops.rewrapped(moved, args[0])
        plain_args, plain_kwargs = torch.utils._pytree.tree_map(as_tensor, (args, kwargs))
        return target(*plain_args, **plain_kwargs)

    def _quantize(self, n: fx.Node) -> Codes:
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, scale, zero_point, quant_min, quant_max = args
        if isinstance(x, Pending):
            steps, codes = x.requantize(scale, zero_point)
        else:
            steps = as_tensor(x) / scale
            codes = torch.round(steps) + zero_point
            steps = steps + zero_point
        codes = codes.clamp_(quant_min, quant_max)
        if self._hook is not None:
            codes = self._hook(self._name(n), codes, steps)
        return Codes(codes, scale, zero_point)

    def _name(self, n: fx.Node) -> str:
        """The quantizer's name, numbered as export numbers one that is used at several places."""
        name = str(n.all_input_nodes[1].target).removesuffix(SCALE)
        self._uses[name] = self._uses.get(name, 0) + 1
        return name if self._uses[name] == 1 else f"{name}.{self._uses[name]}"
