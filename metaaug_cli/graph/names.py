"""Names of the user's modules where torch's graph modules keep attributes of their own."""

from __future__ import annotations

from functools import cache

from torch import fx, nn


def free_name(path: str) -> str:
    """A dotted path that can stand in a graph module: ``code.weight`` becomes ``code_.weight``.

    A network may call its layers ``code``, ``graph`` or ``meta``, which a graph module cannot hold under
    these names.
    """
    first, dot, rest = path.partition(".")
    return f"{first}_{dot}{rest}" if first in _taken() else path


@cache
def _taken() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
