"""The sections of a recipe: what may be set, in which range, and what it means to the user."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from metaaug_cli.errors import RecipeError
from metaaug_cli.recipe.augment_kinds import OPERATION_NAMES, check_kind

Bits = Annotated[int, Field(ge=2, le=8)]


def _computable(value: float) -> float:
    if value > _LARGEST:
        raise ValueError(f"must be at most {_LARGEST:g}")
    return value


_LARGEST = 1e9  # far beyond any use, and far from overflow in float32
Positive = Annotated[float, Field(gt=0), AfterValidator(_computable)]
NotNegative = Annotated[float, Field(ge=0), AfterValidator(_computable)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Calibration(Section):
    """Which images the quantizers are fitted on."""

    num: int = Field(
        default=1024, ge=1, description="Images to draw, balanced over classes; fewer if fewer exist."
    )
    holdout: int = Field(
        default=0,
        ge=0,
        description="Of these, images kept out of learning to measure how far the blocks overfit the others.",
    )
    synthetic: int = Field(
        default=0,
        ge=0,
        description="Images made from the network's batch norms to learn on besides; kept for later runs.",
    )


class PreprocessingOverrides(Section):
    """How an image becomes the network's input; ``null`` leaves the model's own choice."""

    size: Side | tuple[Side, Side] | None = Field(
        default=None, description="Input size in pixels: one number, or [height, width]."
    )
    resize: Side | Literal["auto", "none"] | None = Field(
        default=None,
        description="Short side in pixels before the centre crop; `auto` resizes only images that do not "
        "already have a fitting size, `none` never resizes.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = Field(
        default=None, description="Filter of the resize."
    )
    mean: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="Subtracted from each channel, in units of the [0, 1] pixel range.",
    )
    std: tuple[Positive, ...] | None = Field(
        default=None, min_length=1, description="Divides each channel, in units of the [0, 1] pixel range."
    )

    @model_validator(mode="after")
    def _same_channels(self) -> Self:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels but std has {len(self.std)}")
        return self

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for ``models.load_model``; what the recipe leaves to the model is left out."""
        options = {key: value for key, value in self if value is not None}
        if isinstance(self.size, int):
            options["size"] = (self.size, self.size)
        if self.resize == "none":
            options["resize"] = None
        return options


class Quantization(Section):
    """Bit-widths, grids and placement of the quantizers."""

    weight_bits: Bits = Field(default=4, description="Bits of the weights, per output channel.")
    act_bits: Bits = Field(
        default=4, description="Bits of the inputs of convolutions and linear layers, per tensor."
    )
    first_last_bits: Bits | Literal["same"] = Field(
        default=8,
        description="Bits of the first and the last layer; `same` uses `weight_bits` and `act_bits`.",
    )
    other_act_bits: Bits | Literal["same"] = Field(
        default=8,
        description="Bits of the tensors that `integer` placement quantizes besides the inputs of layers "
        "(branches before an addition, pools, network output); `same` uses `act_bits`.",
    )
    stem_output_bits: Bits | Literal["same"] | None = Field(
        default=8,
        description="Bits of the first layer's output. At few bits it costs accuracy, so that the default "
        "is 8, as in Genie's code; `same` (`null` in older recipes) uses `act_bits`.",
    )
    placement: Literal["integer", "full", "academic"] = Field(
        default="integer",
        description="`integer` quantizes every tensor, so that the whole network runs on integer kernels; "
        "`full` does so with `weight_bits` and `act_bits` everywhere: it reads none of `first_last_bits`, "
        "`other_act_bits` and `stem_output_bits`, and refuses them at numbers other than 8, the default; "
        "`academic` quantizes only the inputs of convolutions and linear layers, as published tables do.",
    )
    scale_power_of_two: bool = Field(
        default=False,
        description="Restrict every scale to a power of two, so that hardware can shift where it would "
        "multiply; weight scales are then searched only, not learned.",
    )
    weight_symmetric: bool | None = Field(
        default=None,
        description="Weight grid without a zero point; `null` chooses symmetric at 8 bits and asymmetric "
        "below.",
    )
    act_symmetric: bool = Field(
        default=True,
        description="Grid of layer inputs around zero (unsigned where no value is negative); the other "
        "tensors of `integer` placement always have a zero point.",
    )
    quantize_output: bool = Field(
        default=True, description="Quantize the logits too (not in `academic` placement)."
    )

    @model_validator(mode="after")
    def _eight_bits_are_symmetric(self) -> Self:
        if self.weight_bits == 8 and self.weight_symmetric is False:
            raise ValueError(
                "weight_symmetric must be true or null at weight_bits 8: code minus zero point does not "
                "fit into int8"
            )
        return self

    @model_validator(mode="after")
    def _full_has_no_exceptions(self) -> Self:
        if self.placement != "full":
            return self
        for key in ("first_last_bits", "other_act_bits", "stem_output_bits"):
            # A recipe cannot tell 8, the default, from an 8 that was meant; null is stem_output_bits of old.
            if getattr(self, key) not in ("same", 8, None):
                raise ValueError(
                    f"{key} {getattr(self, key)} has no place in full placement, which puts every layer "
                    f"and tensor at weight_bits {self.weight_bits} and act_bits {self.act_bits}; "
                    "leave it out, or use placement integer"
                )
        return self


class Reconstruction(Section):
    """How the blocks are fitted to the float network."""

    method: Literal["nearest", "gptq", "adaround", "brecq", "qdrop", "genie"] = Field(
        default="genie",
        description="`nearest` searches scales and learns nothing; `gptq` rounds the weights of a layer one "
        "after the other, each making up for the error of those before it, and learns nothing; `adaround` "
        "learns the rounding layer by layer; `brecq` block by block, with the activation scales; `qdrop` "
        "leaves activations unquantized at random while it learns; `genie` learns the weight scales too.",
    )
    start: Literal["second-order", "nearest"] = Field(
        default="second-order",
        description="Codes that learning starts from: those of `gptq`, or the nearest ones as published.",
    )
    iterations: int = Field(default=2000, ge=1, description="Optimizer steps per block.")
    batch_size: int = Field(default=32, ge=1, description="Images per step.")
    quant_prob: Fraction = Field(
        default=0.5,
        description="Chance that an activation element is quantized while training (`qdrop`, `genie`).",
    )
    rounding_lr: Positive = Field(
        default=1e-3, description="Adam's rate of the rounding logits, before `lr_scale`."
    )
    weight_scale_lr: Positive = Field(
        default=1e-3,
        description="Adam's rate of the weight scales, as a share of each searched scale and before "
        "`lr_scale`; cosine-decayed to 0.",
    )
    act_scale_lr: Positive = Field(
        default=1e-4,
        description="Adam's rate of the activation scales, as a share of each searched scale and before "
        "`lr_scale`; cosine-decayed to 0.",
    )
    lr_scale: Literal["auto"] | Positive = Field(
        default="auto",
        description="Factor on the three rates; `auto` is 1 for long schedules and more for short ones.",
    )
    rounding_weight: NotNegative = Field(
        default=1.0, description="Weight of the regulariser that drives the rounding to 0 or 1."
    )
    rounding_warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.2, description="Share of the iterations before the regulariser starts."
    )
    beta_start: Positive = Field(default=20.0, description="Exponent of the regulariser when it starts.")
    beta_end: Positive = Field(default=2.0, description="Exponent that it falls to.")
    scale_norm: Positive = Field(
        default=2.4, description="Exponent of the error that the scale search minimises."
    )
    max_block_layers: int = Field(
        default=16, ge=1, description="Convolutions and linear layers in a block before it is split."
    )

    @model_validator(mode="after")
    def _beta_falls(self) -> Self:
        if self.beta_end > self.beta_start:
            raise ValueError(f"beta_end {self.beta_end:g} is above beta_start {self.beta_start:g}")
        return self


class Augmentation(Section):
    """Changed copies of the calibration images to learn on besides the images themselves."""

    kind: str = Field(
        default="auto",
        description="`auto` is `metaaug` where weights or activations have 2 bits and something is learned "
        "on real images alone, else `none`. `metaaug` is the learned augmenter, alone or with operations on "
        "its images (`metaaug+trivial-geometric`). Fixed operations, joined by `+`: "
        f"{', '.join(OPERATION_NAMES)}.",
    )
    copies: int | Literal["auto"] = Field(
        default="auto",
        description="Copies of each image; `auto` is 8, fewer where that makes more than 2048. The learned "
        "forms `unet` and `residual` make one, unless operations follow.",
    )

    @field_validator("kind")
    @classmethod
    def _exists(cls, value: str) -> str:
        try:
            check_kind(value)
        except RecipeError as error:
            raise ValueError("; ".join(text for text in (error.message, error.hint) if text)) from None
        return value.strip()

    @field_validator("copies")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("copies must be at least 1, or auto")
        return value

    def copies_for(self, images: int) -> int:
        """Copies of each of ``images`` images; 0 for the kind ``none``."""
        if self.kind == "none":
            return 0
        return self.copies if isinstance(self.copies, int) else max(1, min(8, 2048 // max(images, 1)))


class MetaAug(Section):
    """How the learned augmenter T is built and taught; used where `augmentation.kind` names `metaaug`."""

    form: Literal["unet", "residual", "policy"] = Field(
        default="policy",
        description="`unet` as published, warmed up to reproduce its input; `residual` adds the UNet's "
        "output, zero at first, to the image; `policy` learns strengths of geometric, colour and mixing "
        "operations.",
    )
    base_width: int = Field(
        default=16, ge=1, le=256, description="Channels of the UNet's first level; 64 in the paper."
    )
    warmup_steps: int = Field(
        default=500, ge=1, description="Steps in which a `unet` learns to reproduce the images."
    )
    steps: int = Field(default=100, ge=1, description="Outer steps for each block; 500 in the paper.")
    batch_size: int = Field(default=32, ge=2, description="Images that T changes in a step.")
    val_batch_size: int = Field(
        default=64, ge=2, description="Original images on which the updated block is validated."
    )
    lr: Literal["auto"] | Positive = Field(
        default="auto",
        description="Adam's rate for T; `auto` is the published 5e-6 at 500 steps for a `unet`, more for "
        "fewer steps and for other forms.",
    )
    grad_clip: Positive = Field(default=0.1, description="Largest norm of T's gradient.")
    epsilon: Literal["auto"] | Positive = Field(
        default="auto",
        description="Distance of T(x) from x: mean squared difference as a share of the images' variance; "
        "`auto` is 0.3 for W2A2 and 0.1 above, as published.",
    )
    distance: Literal["projection", "margin", "published"] = Field(
        default="projection",
        description="`projection` draws T(x) back to at most epsilon; `margin` punishes any other distance; "
        "`published` only punishes less. A `policy` is held by the ranges of its operations instead of a "
        "projection.",
    )
    val_weight: NotNegative = Field(default=5.0, description="Weight of the validation term, lambda 1.")
    margin_weight: NotNegative = Field(default=0.5, description="Weight of the margin, lambda 2.")
    preserve_weight: NotNegative = Field(
        default=3e4, description="Weight of the preservation term, lambda 3."
    )
    preservation: Literal["dp", "kl", "mse"] = Field(
        default="dp",
        description="What T(x) has to preserve: `dp` the similarities between the images' features, `kl` the "
        "predictions, `mse` the features.",
    )
    inner: Literal["adam-fresh", "preconditioned", "sgd"] = Field(
        default="preconditioned",
        description="The inner step: `adam-fresh` as released, whose validation gradient all but vanishes; "
        "`preconditioned` and `sgd` keep it alive.",
    )
    inner_rate: Positive = Field(
        default=1.0, description="Factor on the block's learning rates in the inner step."
    )
    restart_every: int = Field(
        default=1,
        ge=1,
        description="Inner steps before the block returns to its start: T learns from that much of its "
        "learning.",
    )
    balance: bool = Field(
        default=True,
        description="Give each term's gradient at T(x) the same norm before the weights apply; off as "
        "published.",
    )
