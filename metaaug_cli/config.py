"""Recipes: every setting of a quantization run, as frozen, strictly validated YAML.

A recipe is read with ``load_recipe``, changed with ``Recipe.override`` and stored with
``Recipe.dump``. All mistakes are reported together; an unknown key is refused with the nearest name.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metaaug_cli.errors import RecipeError
from metaaug_cli.recipe_errors import describe_mistakes, listing, suggestion, unknown_key

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1)]

_OPERATION = "(flip|crop|geometric|photometric|mixup)"
_AUGMENTATION_PATTERN = rf"^(none|{_OPERATION}(\+{_OPERATION})*)$"
_RECIPE_SUFFIXES = {".yaml", ".yml"}
_KEYS_HINT = "keys are written section.key, as in docs/reference/recipe.md"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Calibration(_Section):
    """Which images the quantizers are fitted on."""

    num: int = Field(
        default=1024, ge=1, description="Images to draw, balanced over classes; fewer if fewer exist."
    )


class PreprocessingOverrides(_Section):
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


class Quantization(_Section):
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
        description="Bits of the tensors that only `integer` placement quantizes (branches before an "
        "addition, pools, network input and output); `same` uses `act_bits`.",
    )
    stem_output_bits: Bits | None = Field(
        default=None, description="Bits of the first layer's output; `null` uses `act_bits`."
    )
    placement: Literal["integer", "full", "academic"] = Field(
        default="integer",
        description="`integer` quantizes every tensor, so that the whole network runs on integer kernels; "
        "`full` does so with `weight_bits` and `act_bits` everywhere, and reads neither `first_last_bits` "
        "nor `other_act_bits`; `academic` quantizes only the inputs of convolutions and linear layers, as "
        "published tables do.",
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
            # 8 and null are the defaults, which a recipe cannot tell from values that were meant.
            if getattr(self, key) not in ("same", 8, None):
                raise ValueError(
                    f"{key} {getattr(self, key)} has no place in full placement, which puts every layer "
                    f"and tensor at weight_bits {self.weight_bits} and act_bits {self.act_bits}; "
                    "leave it out, or use placement integer"
                )
        return self


class Reconstruction(_Section):
    """How the blocks are fitted to the float network."""

    method: Literal["nearest", "adaround", "brecq", "qdrop", "genie"] = Field(
        default="genie",
        description="`nearest` searches scales and learns nothing; `adaround` learns the rounding layer by "
        "layer; `brecq` block by block, with the activation scales; `qdrop` leaves activations "
        "unquantized at random while it learns; `genie` learns the weight scales too.",
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
    rounding_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the regulariser that drives the rounding to 0 or 1."
    )
    rounding_warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.2, description="Share of the iterations before the regulariser starts."
    )
    beta_start: Positive = Field(default=20.0, description="Exponent of the regulariser when it starts.")
    beta_end: Positive = Field(default=2.0, description="Exponent of the regulariser at the last iteration.")
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


class Augmentation(_Section):
    """Changed copies of the calibration images to learn on besides the images themselves."""

    kind: str = Field(
        default="none",
        pattern=_AUGMENTATION_PATTERN,
        description="`none`, or operations joined by `+`: flip, crop, geometric, photometric, mixup.",
    )
    copies: int | Literal["auto"] = Field(
        default="auto",
        description="Copies of each image; `auto` is 8, fewer where that makes more than 2048.",
    )

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


class Recipe(_Section):
    """All settings of one run. Equal recipes and equal inputs give equal artefacts on CPU."""

    name: str = Field(
        default="custom", min_length=1, description="Shown in reports; no effect on the result."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every random choice.")
    calibration: Calibration = Calibration()
    preprocessing: PreprocessingOverrides = PreprocessingOverrides()
    quantization: Quantization = Quantization()
    augmentation: Augmentation = Augmentation()
    reconstruction: Reconstruction = Reconstruction()

    @field_validator(
        "calibration", "preprocessing", "quantization", "augmentation", "reconstruction", mode="before"
    )
    @classmethod
    def _empty_section(cls, value: object) -> object:
        """A section whose keys are all commented out is ``null`` in YAML."""
        return {} if value is None else value

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, where: str = "recipe") -> "Recipe":
        """Validate a mapping of sections.

        Raises:
            RecipeError: Listing every mistake; ``where`` names the file or flag in the message.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise RecipeError(listing(where, describe_mistakes(error, cls)), hint=_KEYS_HINT) from None

    def override(self, assignments: Iterable[str], *, where: str = "--set") -> "Recipe":
        """A copy with ``section.key=value`` assignments applied; values are YAML.

        Raises:
            RecipeError: Listing every assignment that is malformed, unknown or out of range.
        """
        settings = self.model_dump(mode="json")
        mistakes = []
        for assignment in assignments:
            try:
                _assign(settings, assignment)
            except ValueError as error:
                mistakes.append(str(error))
        try:
            changed = Recipe.model_validate(settings)
        except ValidationError as error:
            mistakes += describe_mistakes(error, Recipe)
        else:
            if not mistakes:
                return changed
        raise RecipeError(listing(where, mistakes), hint=_KEYS_HINT)

    def dump(self) -> str:
        """The fully resolved recipe as YAML; ``load_recipe`` of the text gives an equal recipe."""
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100
        )

    def sha256(self) -> str:
        """Hex digest over every setting that can change the result (all but ``name``)."""
        settings = self.model_dump(mode="json", exclude={"name"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a shipped recipe by name (``"w4a4"``) or a YAML file by path.

    Raises:
        RecipeError: No such recipe, text that is not YAML, or settings that do not validate.
    """
    path = Path(name_or_path)
    if path.suffix not in _RECIPE_SUFFIXES:
        path = _shipped_path(str(name_or_path))
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"cannot read recipe {path}: {reason}", hint=_shipped_hint()) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {_one_line(error)}") from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections, not {type(settings).__name__}")
    return Recipe.from_dict({"name": path.stem, **settings}, where=f"recipe {path}")


def shipped_recipes() -> dict[str, Path]:
    """Name and file of every recipe that comes with metaaug."""
    package = Path(__file__).resolve().parent
    # A wheel carries the recipes inside the package, a checkout beside it.
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep=deep)


def _shipped_path(name: str) -> Path:
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"no recipe named {name!r}{suggestion(name, shipped)}", hint=_shipped_hint())


def _shipped_hint() -> str:
    return f"give a .yaml file or one of: {', '.join(shipped_recipes())}"


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1})" if mark else problem


def _assign(settings: dict[str, Any], assignment: str) -> None:
    """Set one dotted key, which must exist: a misspelt section is not created."""
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not key or not equals:
        raise ValueError(f"{assignment!r} is not section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {_one_line(error)}") from None
    *sections, leaf = key.split(".")
    for depth, section in enumerate(sections):
        inner = settings.get(section)
        if not isinstance(inner, dict):
            raise ValueError(unknown_key(".".join(sections[: depth + 1]), Recipe))
        settings = inner
    if leaf not in settings:
        raise ValueError(unknown_key(key, Recipe))
    if isinstance(settings[leaf], dict):
        raise ValueError(f"{key} is a section: set one of its keys, {', '.join(settings[leaf])}")
    settings[leaf] = value
