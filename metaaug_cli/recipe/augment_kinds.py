"""How a kind of augmentation is written: fixed operations joined by ``+``, or ``metaaug`` and some of them.

Free of torch, because a recipe is checked before anything heavy is loaded. The functions are in
``augmentation/fixed.py``.
"""

from __future__ import annotations

from metaaug_cli.errors import RecipeError
from metaaug_cli.recipe.recipe_errors import suggestion

NONE, AUTO, LEARNED = "none", "auto", "metaaug"

OPERATION_NAMES = (
    "flip",
    "crop",
    "rotate",
    "geometric",
    "brightness",
    "contrast",
    "photometric",
    "trivial",
    "trivial-geometric",
    "trivial-photometric",
    "rand",
    "rand-geometric",
    "rand-photometric",
    "mixup",
    "cutmix",
)
"""Fixed operations in the order they are applied: each image is changed alone first and mixed last."""

_RULES = {
    NONE: "stands alone",
    AUTO: "stands alone and is decided before an image is changed",
    LEARNED: "is learned, comes first and once",
}


def check_kind(kind: str) -> None:
    """Whether a recipe may say this kind.

    Args:
        kind: ``none``, ``auto``, ``metaaug``, operations joined by ``+``, or ``metaaug+`` and operations.

    Raises:
        RecipeError: It may not; the message names the nearest word that exists.
    """
    if kind.strip() != AUTO:
        parse_kind(learned_part(kind)[1])


def learned_part(kind: str) -> tuple[bool, str]:
    """Whether a kind asks for the learned augmenter, and its fixed operations.

    Args:
        kind: As in ``check_kind``, except ``auto``: the caller decides first what that stands for.

    Returns:
        (True, the operations to apply on top of the learned copies) for a kind that starts with
        ``metaaug``, else (False, the kind); ``none`` where no operation is left.

    Raises:
        RecipeError: A word that does not exist, ``auto``, or ``metaaug`` that is not the first word.
    """
    parts = _parts(kind)
    learned = parts[0] == LEARNED
    rest = parts[1:] if learned else parts
    if learned or rest != [NONE]:
        _require_operations(rest)
    return learned, "+".join(rest) or NONE


def parse_kind(kind: str) -> list[str]:
    """The fixed operations of a kind, in the order they are applied; empty for ``none``.

    Args:
        kind: ``none``, or operations joined by ``+`` in any order.

    Raises:
        RecipeError: An operation that does not exist.
    """
    parts = _parts(kind)
    if parts == [NONE]:
        return []
    _require_operations(parts)
    return [name for name in OPERATION_NAMES if name in parts]


def _parts(kind: str) -> list[str]:
    return [part.strip() for part in kind.split("+")]


def _require_operations(names: list[str]) -> None:
    for word, rule in _RULES.items():
        if word in names:
            raise RecipeError(f"augmentation {word!r} {rule}, not {'+'.join(names)!r}")
    unknown = [name for name in names if name not in OPERATION_NAMES]
    if unknown:
        known = [*_RULES, *OPERATION_NAMES]
        raise RecipeError(
            f"no augmentation named {', '.join(f'{name!r}{suggestion(name, known)}' for name in unknown)}",
            hint=f"use {NONE}, {LEARNED}, or operations joined by +: {', '.join(OPERATION_NAMES)}",
        )
