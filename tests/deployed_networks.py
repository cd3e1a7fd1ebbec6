"""Small networks of integer codes with random weights, in the form that deployment gives them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaaug_cli.deployment import qdq_ops  # noqa: F401 - registers torch.ops.metaaug

SIZE = (3, 16, 16)


class Act(nn.Module):
    """An activation quantizer."""

    def __init__(self, scale: float, bits: int = 8, *, signed: bool = False, quant_max: int | None = None):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.zero_point = 2 ** (bits - 1) if signed else 0
        self.quant_max = 2**bits - 1 if quant_max is None else quant_max

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.metaaug.fake_quantize(x, self.scale, self.zero_point, 0, self.quant_max)


class _Layer(nn.Module):
    def __init__(self, shape: tuple[int, ...], bits: int, in_scale: Tensor, seed: int, bias: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        rows = weight.flatten(1)
        if bits == 8:
            scale, zero_point = rows.abs().amax(1) / 127, torch.zeros(shape[0])
            codes = torch.round(rows / scale[:, None])
        else:
            low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
            scale = (high - low) * 0.8 / (2**bits - 1)
            zero_point = torch.round(-low / scale).clamp(0, 2**bits - 1)
            codes = (torch.round(rows / scale[:, None]) + zero_point[:, None]).clamp(0, 2**bits - 1)
        self.register_buffer("codes", (codes - zero_point[:, None]).reshape(shape).to(torch.int8))
        self.register_buffer("scale", scale)
        self.has_bias = bias
        if bias:
            values = 0.2 * torch.randn(shape[0], generator=generator)
            self.register_buffer("bias_scale", in_scale * scale)
            self.register_buffer("bias_codes", torch.round(values / self.bias_scale).to(torch.int32))

    def parameters_(self) -> tuple[Tensor, Tensor | None]:
        ops = torch.ops.metaaug
        bias = ops.dequantize_bias(self.bias_codes, self.bias_scale) if self.has_bias else None
        return ops.dequantize_weight(self.codes, self.scale), bias


class Conv(_Layer):
    def __init__(self, inputs, outputs, kernel, bits, in_act, *, seed=0, bias=True, groups=1, **settings):
        super().__init__((outputs, inputs // groups, kernel, kernel), bits, in_act.scale, seed, bias)
        self.settings = {"padding": kernel // 2, "groups": groups, **settings}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, *self.parameters_(), **self.settings)


class Linear(_Layer):
    def __init__(self, inputs, outputs, bits, in_act, *, seed=0):
        super().__init__((outputs, inputs), bits, in_act.scale, seed, True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.parameters_())


class Residual(nn.Module):
    """Stem, residual addition, depthwise, pointwise without bias, max pool, global pool, linear head."""

    def __init__(self, weight_bits: int, act_bits: int) -> None:
        super().__init__()
        step = 0.0213 if act_bits == 8 else 0.3137 if act_bits == 4 else 0.9731
        self.input = Act(0.0317, signed=True)
        self.stem = Conv(3, 8, 3, 8, self.input)
        self.act1 = Act(step, act_bits)
        self.conv1 = Conv(8, 8, 3, weight_bits, self.act1, seed=1)
        self.act2 = Act(step, act_bits)  # the same scale as act1, which must not cost it its name
        self.conv2 = Conv(8, 8, 3, weight_bits, self.act2, seed=2)
        self.branch = Act(0.0289, signed=True)
        self.act3 = Act(1.17 * step, act_bits)
        self.depthwise = Conv(8, 8, 3, weight_bits, self.act3, seed=3, groups=8, stride=2)
        self.act4 = Act(0.93 * step, act_bits, quant_max={8: 200, 4: 12, 2: 3}[act_bits])
        self.pointwise = Conv(8, 12, 1, weight_bits, self.act4, seed=4, bias=False)
        self.act5 = Act(0.0131)
        self.pooled = Act(0.0117)
        self.head = Linear(12, 10, 8, self.pooled, seed=5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.stem(self.input(x)))
        x = self.act3(x + self.branch(self.conv2(self.act2(self.conv1(x)))))
        x = self.act4(self.depthwise(F.max_pool2d(x, 3, 2, 1)))
        x = self.pooled(torch.ops.metaaug.global_average_pool(self.act5(self.pointwise(x))))
        return self.head(x.flatten(1))


class Middle(nn.Module):
    """A stem and a head around one operator pattern under test."""

    def __init__(self, act_bits: int = 4, width: int = 8) -> None:
        super().__init__()
        self.input = Act(0.0317, signed=True)
        self.stem = Conv(3, 8, 3, 8, self.input)
        self.act = Act(0.3137 if act_bits == 4 else 0.0213, act_bits)
        self.pooled = Act(0.0117)
        self.head = Linear(width, 10, 8, self.pooled, seed=9)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.act(self.stem(self.input(x))))
        return self.head(self.pooled(torch.ops.metaaug.global_average_pool(x)).flatten(1))


class Concat(Middle):
    def __init__(self) -> None:
        super().__init__(width=16)
        self.conv = Conv(8, 8, 3, 4, self.act, seed=1)
        self.branch = Act(0.2711, 4)
        self.joined = Act(0.3391, 4)

    def middle(self, x):
        return self.joined(torch.cat([x, self.branch(self.conv(x))], 1))


class SharedConcat(Middle):
    """Concatenation of equal grids: codes are joined, no quantizer after it."""

    def __init__(self) -> None:
        super().__init__(width=16)
        self.conv = Conv(16, 16, 1, 4, self.act, seed=1)
        self.last = Act(0.2711, 4)

    def middle(self, x):
        return self.last(self.conv(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)))


class Shuffle(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(4, 4, 3, 4, self.act, seed=1)
        self.branch = Act(0.2711, 4)
        self.joined = Act(0.3391, 4)
        self.mix = Conv(8, 8, 1, 4, self.joined, seed=2)
        self.last = Act(0.1831, 4)

    def middle(self, x):
        x = self.joined(torch.cat([x[:, :4], self.branch(self.conv(x[:, 4:]))], 1))
        shuffled = x.view(-1, 2, 4, 16, 16).transpose(1, 2).reshape(-1, 8, 16, 16)
        return self.last(self.mix(shuffled))


class SqueezeExcite(Middle):
    def __init__(self, gate=torch.sigmoid) -> None:
        super().__init__()
        self.gate = gate
        self.squeezed = Act(0.0133)
        self.reduce = Conv(8, 4, 1, 4, self.squeezed, seed=1)
        self.reduced = Act(0.0113)
        self.expand = Conv(4, 8, 1, 4, self.reduced, seed=2)
        self.expanded = Act(0.0297, signed=True)
        self.opened = Act(1 / 255)
        self.scaled = Act(0.2911, 4)

    def middle(self, x):
        y = self.reduced(self.reduce(self.squeezed(torch.ops.metaaug.global_average_pool(x))))
        return self.scaled(x * self.opened(self.gate(self.expanded(self.expand(y)))))


class HardSqueezeExcite(SqueezeExcite):
    def __init__(self) -> None:
        super().__init__(F.hardsigmoid)


class HardSwish(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(8, 8, 1, 4, self.act, seed=1)
        self.before = Act(0.0297, signed=True)
        self.after = Act(0.0211)
        self.last = Conv(8, 8, 1, 4, self.after, seed=2)
        self.end = Act(0.1733, 4)

    def middle(self, x):
        return self.end(self.last(self.after(F.hardswish(self.before(self.conv(x))))))


class AveragePool(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.averaged = Act(0.2671, 4)
        self.conv = Conv(8, 8, 3, 4, self.averaged, seed=1)
        self.last = Act(0.1733, 4)

    def middle(self, x):
        return self.last(self.conv(self.averaged(F.avg_pool2d(x, 3, 2, 1))))


class Padded(Middle):
    """Explicit zero padding before a convolution (signed grid) and before a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(8, 8, 1, 4, self.act, seed=1)
        self.signed = Act(0.0297, signed=True)
        self.padded = Conv(8, 8, 3, 4, self.signed, seed=2, padding=0, stride=2)
        self.last = Act(0.1733, 4)

    def middle(self, x):
        x = self.last(self.padded(F.pad(self.signed(self.conv(x)), (0, 1, 0, 1))))
        return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2)


class Upsampled(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(8, 8, 3, 4, self.act, seed=1)
        self.last = Act(0.1733, 4)

    def middle(self, x):
        a, b = F.interpolate(x, scale_factor=2, mode="nearest").roll((1, 2), (2, 3)).chunk(2, 1)
        return self.last(self.conv(torch.cat([b, a], 1)))


class Attention(Middle):
    """Patch tokens, layer norm, self-attention in float between integer linears."""

    def __init__(self) -> None:
        super().__init__(act_bits=8)
        self.norm = nn.LayerNorm(8)
        self.normed = Act(0.0313, signed=True)
        self.qkv = Linear(8, 24, 4, self.normed, seed=1)
        self.projected = Act(0.0231, signed=True)
        self.attended = Act(0.0119, signed=True)
        self.out = Linear(8, 8, 4, self.attended, seed=2)
        self.branch = Act(0.0117, signed=True)
        self.summed = Act(0.0331, signed=True)

    def middle(self, x):
        tokens = F.max_pool2d(x, 4).flatten(2).transpose(1, 2)
        y = self.normed(self.norm(tokens)).reshape(-1, 8)
        q, k, v = self.projected(self.qkv(y)).view(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).reshape(-1, 8)
        tokens = self.summed(tokens + self.branch(self.out(self.attended(y))).view(-1, 16, 8))
        return tokens.transpose(1, 2).reshape(-1, 8, 4, 4)


BITS = {"W8A8": (8, 8), "W4A4": (4, 4), "W2A4": (2, 4), "W2A2": (2, 2)}
INTEGER_PATTERNS = [Concat, SharedConcat, Shuffle, SqueezeExcite, AveragePool, Padded, Upsampled]
FLOAT_PATTERNS = [HardSqueezeExcite, HardSwish, Attention]


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def as_graph(module: nn.Module) -> torch.fx.GraphModule:
    """The module as a graph of ATen operators, which the simulation runs."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (torch.zeros(2, *SIZE),), dynamic_shapes=({0: batch},))
    return program.module()
