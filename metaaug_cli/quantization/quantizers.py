"""The two learned quantizers: weights (Genie-M) and activations (LSQ with QDrop)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaaug_cli.quantization.drops import drop_mask
from metaaug_cli.quantization.functional import (
    fake_quantize,
    inverse_soft_rounding,
    nearest_power_of_two,
    search_scale,
    soft_rounding,
)
from metaaug_cli.quantization.fused import drop_fake_quantize

_SEARCH_SAMPLE = 1 << 17
_STEP_PRIME = 2_654_435_761  # near 2^32 over the golden ratio, which spreads its multiples
CONTAINER_BITS = 8
_LEAST_ACTIVATION_SCALE = 1e-6
_LEAST_RELATIVE_SCALE = 2.0**-14
_VANISHING, _DEAD_SCALE = 1e-6, 1e-3
_CLEAR = 1e-3  # how far from 1/2 a soft rounding starts, so that the code it stands for is beyond doubt


def learned_scale(base: Tensor, relative: Tensor, *, power_of_two: bool) -> Tensor:
    """The searched scale times what was learned, or the power of two nearest to that."""
    scale = base * relative
    return nearest_power_of_two(scale) if power_of_two else scale


class WeightQuantizer(nn.Module):
    """Per-channel weight grid whose rounding and scale are learned together.

    Genie-M (Jeon et al., CVPR 2023, eq. 5): ``W_q = s * (clamp(floor(W / s_init) + h(V) + z, 0, 2^b - 1)
    - z)``; the floor stays on the initial scale, so V and s can move at once.

    Args:
        weight: (out, …) float weight.
        bits: 2 to 8.
        symmetric: Zero point in the middle of the grid instead of searched.
        norm: Exponent of the scale search.
        power_of_two: Restrict the scales to powers of two.
    """

    def __init__(
        self, weight: Tensor, bits: int, *, symmetric: bool, norm: float = 2.4, power_of_two: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.power_of_two = bits, symmetric, power_of_two
        rows = weight.detach().flatten(1)
        largest = rows.abs().amax(1)
        mirrored = torch.stack([-largest, largest], 1) if symmetric else None
        # At 8 bits clipping gains nothing in the weight and loses agreement with float in the output.
        scale, zero_point = search_scale(
            rows,
            bits,
            symmetric=symmetric,
            norm=norm,
            full_range=mirrored,
            clip=bits < CONTAINER_BITS,
            scale_power_of_two=power_of_two,
        )
        if symmetric:
            zero_point = torch.full_like(zero_point, 2 ** (bits - 1))
        scale = _within_int32(scale)
        if float(largest.max()) < _VANISHING:  # a dead layer: its codes are 0 on any grid
            scale = torch.full_like(scale, _DEAD_SCALE)
        per_channel = (-1, *[1] * (weight.dim() - 1))
        scaled = weight.detach() / scale.view(per_channel)
        self.register_buffer("base", torch.floor(scaled))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("base_scale", scale)
        self.relative_scale = nn.Parameter(torch.ones_like(scale))
        self.rounding_logits = nn.Parameter(inverse_soft_rounding(scaled - torch.floor(scaled)))
        self.soft = False

    base: Tensor
    base_scale: Tensor
    relative_scale: nn.Parameter
    zero_point: Tensor

    @property
    def scale(self) -> Tensor:
        """(out,) step sizes; differentiable with respect to the learned ``relative_scale``."""
        return learned_scale(self.base_scale, self.relative_scale, power_of_two=self.power_of_two)

    def rounding(self) -> Tensor:
        """h(V) in [0, 1] while learning, 0 or 1 afterwards; shaped like the weight."""
        if self.soft:
            return soft_rounding(self.rounding_logits)
        return (self.rounding_logits >= 0).to(self.base.dtype)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The float weight as given, as long as nothing is learned."""
        scale = self.base_scale.view(-1, *[1] * (self.base.dim() - 1))
        return (self.base + soft_rounding(self.rounding_logits)) * scale

    @torch.no_grad()
    def start_at(self, codes: Tensor, scale: Tensor, wanted: Tensor) -> None:
        """Begin with other codes than the nearest; learning may move each towards ``wanted``.

        The soft rounding starts halfway between the code and the wanted weight: at the weight itself it
        would forget the codes, at the codes it would hardly move.

        Args:
            codes: Signed, code minus zero point, shaped like the weight.
            scale: (out,) positive.
            wanted: Float weight that the codes stand for.
        """
        per_channel = (-1, *[1] * (self.base.dim() - 1))
        scale, codes = _within_int32(scale.to(self.base.dtype)), codes.to(self.base.dtype)
        zero_point = self.zero_point.view(per_channel)
        exact = (wanted / scale.view(per_channel)).to(codes.dtype)
        exact = torch.clamp(exact, -zero_point, 2**self.bits - 1 - zero_point)
        exact = torch.clamp(exact, codes - 1, codes + 1)
        above = codes < exact
        base = torch.where(above, codes, codes - 1)
        halfway = (0.5 * (exact + codes) - base).to(codes.dtype)
        halfway = torch.where(above, halfway.clamp(max=0.5 - _CLEAR), halfway.clamp(min=0.5 + _CLEAR))
        self.base.copy_(base)
        self.base_scale.copy_(scale)
        self.relative_scale.fill_(1.0)
        self.rounding_logits.copy_(inverse_soft_rounding(halfway))

    def codes(self) -> Tensor:
        """Unsigned codes as floats, shaped like the weight."""
        zero_point = self.zero_point.view(-1, *[1] * (self.base.dim() - 1))
        return torch.clamp(self.base + self.rounding() + zero_point, 0, 2**self.bits - 1)

    def forward(self) -> Tensor:
        """The weight on its grid, in float."""
        per_channel = (-1, *[1] * (self.base.dim() - 1))
        return (self.codes() - self.zero_point.view(per_channel)) * self.scale.view(per_channel)

    def state(self) -> dict[str, Tensor]:
        """Hard codes (uint8), scale (float32) and zero point (uint8): all that deployment needs."""
        soft, self.soft = self.soft, False
        codes = self.codes().detach().to(torch.uint8)
        self.soft = soft
        return {
            "codes": codes.cpu().contiguous(),
            "scale": self.scale.detach().cpu().clone(),
            "zero_point": self.zero_point.to(torch.uint8).cpu(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state; the rounding is hard from then on."""
        device = self.base.device
        zero_point = state["zero_point"].to(device).float()
        codes = state["codes"].to(device).float()
        self.zero_point.copy_(zero_point)
        self.base.copy_(codes - zero_point.view(-1, *[1] * (codes.dim() - 1)))
        with torch.no_grad():
            self.base_scale.copy_(state["scale"].to(device))
            self.relative_scale.fill_(1.0)
            self.rounding_logits.fill_(-1.0)
        self.soft = False


class ActivationQuantizer(nn.Module):
    """Per-tensor activation grid with a learned scale; QDrop while training.

    LSQ (Esser et al., ICLR 2020) for the scale; QDrop (Wei et al., ICLR 2022, eq. 4) for the drop: while
    training, each element is quantized with probability ``quant_prob`` and left in full precision otherwise.

    Args:
        bits: 2 to 8.
        symmetric: Zero point at 0 (nothing negative) or 2^(bits - 1); else searched.
        norm: Exponent of the scale search.
        clip: Whether the search may clip; False for logits, whose greatest values are what counts.
        power_of_two: Restrict the scale to powers of two.

    ``headroom`` widens the range that ``search`` finds, for images that understate it.
    """

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool,
        norm: float = 2.4,
        clip: bool = True,
        power_of_two: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.norm, self.clip = bits, symmetric, norm, clip
        self.power_of_two = power_of_two
        self.register_buffer("base_scale", torch.tensor(1.0))
        self.relative_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0.0))
        self.headroom = 1.0
        self.quant_prob = 1.0
        self.generator: torch.Generator | None = None
        self.twice_differentiable = False

    base_scale: Tensor
    relative_scale: nn.Parameter
    zero_point: Tensor

    @property
    def scale(self) -> Tensor:
        """() step size; differentiable with respect to the learned ``relative_scale``."""
        return learned_scale(self.base_scale, self.relative_scale, power_of_two=self.power_of_two)

    @torch.no_grad()
    def search(self, x: Tensor) -> None:
        """Set scale and zero point from the values ``x`` (any shape); large tensors are sampled evenly."""
        flat = x.detach().flatten()
        full_range = torch.stack([flat.amin(), flat.amax()])[None] * self.headroom
        sample = _spread_sample(flat, _SEARCH_SAMPLE)[None]
        scale, zero_point = search_scale(
            sample,
            self.bits,
            symmetric=self.symmetric,
            norm=self.norm,
            full_range=full_range,
            clip=self.clip,
            scale_power_of_two=self.power_of_two,
        )
        # Values that all but vanish must not make the bias grid of the next layer finer than int32 holds.
        self.base_scale.copy_(scale[0].clamp(min=_LEAST_ACTIVATION_SCALE))
        self.relative_scale.fill_(1.0)
        self.zero_point.copy_(zero_point[0])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, or mixed element by element with full precision while training."""
        if not self.twice_differentiable:
            return drop_fake_quantize(
                x, self.scale, self.zero_point, self.bits, prob=self.quant_prob, generator=self.generator
            )
        quantized = fake_quantize(x, self.scale, self.zero_point, self.bits)
        if self.quant_prob >= 1.0:
            return quantized
        return torch.lerp(x, quantized, drop_mask(x, self.quant_prob, self.generator))

    def state(self) -> dict[str, Tensor]:
        """Scale (float32) and zero point (uint8), both 0-d."""
        return {
            "scale": self.scale.detach().cpu().clone(),
            "zero_point": self.zero_point.to(torch.uint8).cpu(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        with torch.no_grad():
            self.base_scale.copy_(state["scale"])
            self.relative_scale.fill_(1.0)
            self.zero_point.copy_(state["zero_point"].float())


def _within_int32(scale: Tensor) -> Tensor:
    """Scales (out,) of which none, a dead channel's, is so near 0 that its bias code passes int32."""
    return torch.maximum(scale, scale.max() * _LEAST_RELATIVE_SCALE)


def _spread_sample(values: Tensor, count: int) -> Tensor:
    """Up to ``count`` of the values (n,), spread evenly; the same ones each time."""
    if values.numel() <= count:
        return values
    # A plain stride shares factors with the image's width and would see the same few columns only.
    positions = torch.arange(count, device=values.device) * _STEP_PRIME % values.numel()
    return values[positions]
