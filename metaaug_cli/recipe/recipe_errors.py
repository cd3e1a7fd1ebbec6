"""Messages for recipe mistakes: the key, what it must be, the value seen, the nearest known key."""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 80, 80


def describe_mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per wrong key; the alternatives of a union are joined into one line."""
    wanted: dict[str, list[str]] = {}
    seen: dict[str, object] = {}
    mistakes = []
    for detail in error.errors(include_url=False):
        key = _key_of(detail["loc"], model)
        if detail["type"] == "extra_forbidden":
            mistakes.append(unknown_key(key, model))
            continue
        text = _meaning(key, model) if detail["type"] == "string_pattern_mismatch" else _plain(detail["msg"])
        wanted.setdefault(key, []).append(text)
        seen[key] = detail["input"]
    for key, alternatives in wanted.items():
        first, *others = alternatives
        text = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
        shown = _BRIEF.repr(seen[key])
        mistakes.append(f"{key}: {text}, not {shown}" if text.startswith("must be ") else f"{key}: {text}")
    return mistakes


def unknown_key(key: str, model: type[BaseModel]) -> str:
    """Message for a key that does not exist, with the nearest one: same section first, then anywhere."""
    section, _, leaf = key.rpartition(".")
    keys = _all_keys(model)
    inside = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    anywhere = {k.rpartition(".")[2]: k for k in keys}
    for candidates in (inside, anywhere):
        if near := get_close_matches(leaf, candidates, n=1, cutoff=0.6):
            return f"{key}: unknown key, did you mean {candidates[near[0]]}?"
    return f"{key}: unknown key"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest of the known names, or nothing."""
    near = get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def listing(where: str, mistakes: list[str]) -> str:
    """The mistakes under one heading; a single one on the heading's line."""
    if len(mistakes) == 1:
        return f"{where}: {mistakes[0]}"
    return "\n".join([f"{where}: {len(mistakes)} mistakes", *(f"  {mistake}" for mistake in mistakes)])


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a section, or None for a plain value or an unknown name."""
    field = model.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _plain(message: str) -> str:
    if message.startswith("Input should be a valid dictionary"):
        return "must be a section with keys"
    if message == "Field required":
        return "must be a complete list"
    return message.removeprefix("Value error, ").replace("Input should be ", "must be ")


def _meaning(key: str, model: type[BaseModel]) -> str:
    """The key's own description, where a pattern would say nothing to a reader."""
    section, _, leaf = key.rpartition(".")
    owner = section_of(model, section) if section else model
    field = owner.model_fields.get(leaf) if owner else None
    text = (field.description if field else None) or "another text"
    return f"must be {text.removesuffix('.').replace('`', '')}"


def _key_of(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Dotted key of a pydantic location, without list positions and names of union alternatives."""
    parts: list[str] = []
    inner: type[BaseModel] | None = model
    for part in location:
        if inner is None:
            break
        parts.append(str(part))
        inner = section_of(inner, str(part))
    return ".".join(parts)


def _all_keys(model: type[BaseModel]) -> list[str]:
    keys = []
    for name in model.model_fields:
        section = section_of(model, name)
        keys += [name, *(f"{name}.{inner}" for inner in (section.model_fields if section else ()))]
    return keys
