"""Names of the user's modules where torch's graph modules keep attributes of their own."""

from __future__ import annotations

import re
from functools import cache

from torch import fx, nn


def free_name(path: str) -> str:
    """A dotted path that can stand in a graph module: ``code.weight`` becomes ``code_.weight``.

    A network may call its layers ``code``, ``graph`` or ``meta``, which a graph module cannot hold under
    these names.
    """
    first, dot, rest = path.partition(".")
    return f"{first}_{dot}{rest}" if first in _taken() else path


def owner_of(node: fx.Node) -> str:
    """The path of the user's module whose forward created a traced node; '' for the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = re.sub(r"^L\['self'\]\.?|^L__self___?", "", path)
    return free_name(re.sub(r"@\d+", "", path))


@cache
def _taken() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
