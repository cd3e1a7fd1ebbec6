"""Recipes: every setting of a quantization run, as frozen, strictly validated YAML.

A recipe is read with ``load_recipe``, changed with ``Recipe.override`` and stored with
``Recipe.dump``. All mistakes are reported together; an unknown key is refused with the nearest name.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from metaaug_cli.errors import RecipeError
from metaaug_cli.recipe.recipe_errors import describe_mistakes, listing, suggestion, unknown_key
from metaaug_cli.recipe.sections import (
    Augmentation,
    Calibration,
    MetaAug,
    PreprocessingOverrides,
    Quantization,
    Reconstruction,
    Section,
)

_RECIPE_SUFFIXES = {".yaml", ".yml"}
_KEYS_HINT = "keys are written section.key, as in docs/reference/recipe.md"


class Recipe(Section):
    """All settings of one run. Equal recipes and equal inputs give equal artefacts on CPU."""

    name: str = Field(
        default="custom", min_length=1, description="Shown in reports; no effect on the result."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every random choice.")
    calibration: Calibration = Calibration()
    preprocessing: PreprocessingOverrides = PreprocessingOverrides()
    quantization: Quantization = Quantization()
    augmentation: Augmentation = Augmentation()
    metaaug: MetaAug = MetaAug()
    reconstruction: Reconstruction = Reconstruction()

    @field_validator(
        "calibration",
        "preprocessing",
        "quantization",
        "augmentation",
        "metaaug",
        "reconstruction",
        mode="before",
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

    def changes_since(self, other: "Recipe") -> list[str]:
        """Settings in which this recipe differs from an earlier one, as "section.key: 20 -> 21"."""
        now, then = (_flat(r.model_dump(mode="json", exclude={"name"})) for r in (self, other))
        return [f"{key}: {then.get(key)} -> {value}" for key, value in now.items() if then.get(key) != value]

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
    except RecursionError:
        raise RecipeError(f"recipe {path} is nested too deeply to be a recipe") from None
    except (ValueError, OverflowError) as error:  # a date or number that YAML makes and Python does not
        raise RecipeError(f"recipe {path} holds a value that cannot be read: {error}") from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections, not {type(settings).__name__}")
    return Recipe.from_dict({"name": path.stem, **settings}, where=f"recipe {path}")


def shipped_recipes() -> dict[str, Path]:
    """Name and file of every recipe that comes with metaaug."""
    package = Path(__file__).resolve().parent.parent
    # A wheel carries the recipes inside the package, a checkout beside it.
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda p: p.stem)}
    return {}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses two equal keys, of which PyYAML keeps the last, and aliases, which can grow without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not for recipes", mark)
        return super().compose_node(parent, index)

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
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {_one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{key}: the value is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{key}: the value cannot be read: {error}") from None
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
