"""Weights files and checkpoints: read without executing code, down to the tensors of one network."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from metaaug_cli.errors import InputError
from metaaug_cli.networks.weights import StateDict, first_line

_logger = logging.getLogger(__name__)

_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "params", "module", "weights")
_AVERAGED_KEY = re.compile(r"(^|_)(ema|swa)(_|$)", re.IGNORECASE)
_LISTED = 5
_MOST_NESTED = 8
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".tar", ".ckpt"}
_NOT_WEIGHTS: tuple[tuple[str, str, Callable[[Tensor], bool]], ...] = (
    (
        "shapes without values (meta tensors)",
        "save the weights after they were loaded or trained",
        lambda t: t.is_meta,
    ),
    ("quantized tensors", "give the float network's weights", lambda t: t.is_quantized),
    ("complex tensors", "metaaug quantizes real networks only", lambda t: t.is_complex()),
    ("nested tensors", "give weights of fixed shapes", lambda t: t.is_nested),
)


@dataclass(frozen=True)
class Weights:
    """What a weights file holds.

    Args:
        state: Tensors by name.
        text: The file and, of a checkpoint, the entry they are from, for people.
    """

    state: StateDict
    text: str


@dataclass(frozen=True)
class _Found:
    """Tensors of a checkpoint, the entry they lie in, and that of averaged ones beside it."""

    tensors: StateDict
    entry: str = ""
    averaged: str = ""


def read_weights(path: Path) -> Weights:
    """Read the tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file.

    A checkpoint that nests its weights (under ``state_dict``, ``model`` and the like) is unwrapped; a set
    of averaged weights (EMA) is taken where there is no other, and named in a warning where there is.
    Pickled files go through PyTorch's restricted loader, so no code in them runs.

    Raises:
        InputError: No such file, a damaged file, one that needs code to load, or one without tensors.
    """
    if not path.is_file():
        raise InputError(f"no weights file at {path}", hint="check the path given to --weights")
    if path.suffix.lower() == ".safetensors":
        try:
            return Weights(load_file(path), path.name)
        except (SafetensorError, OSError) as exc:
            raise InputError(f"{path} is not a readable safetensors file: {exc}") from exc
    if path.suffix.lower() not in _PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is not a weights file that can be read",
            hint="weights come as .safetensors, .pt or .pth",
        )
    loaded = _restricted_load(path)
    found = _find_tensors(loaded)
    if found is None:
        raise _no_weights(loaded, path)
    if found.averaged:
        _logger.warning(
            "%s: weights taken from %s; averaged ones (EMA) lie beside it in %r and are not used "
            "(to use them, save that entry as a file of its own)",
            path.name,
            f"its {found.entry!r} entry" if found.entry else "its top level",
            found.averaged,
        )
    text = f"{path.name}, its {found.entry!r} entry" if found.entry else path.name
    return Weights(_dense(found.tensors, path), text)


def _dense(state: StateDict, path: Path) -> StateDict:
    """Sparse tensors, as pruned networks may store them, as dense ones; other kinds are refused."""
    for kind, hint, is_so in _NOT_WEIGHTS:
        found = [name for name, tensor in state.items() if is_so(tensor)]
        if found:
            raise InputError(f"{path} holds {kind}: {found[0]}", hint=hint)
    return {k: v.to_dense() if v.layout != torch.strided else v for k, v in state.items()}


def _restricted_load(path: Path) -> object:
    try:
        # Training scripts store their arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was written, which its reader cannot change
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(exc))
        reason = f"it holds a {blocked.group(1)}, not only tensors" if blocked else "it is not a tensor file"
        raise InputError(
            f"{path} cannot be loaded without executing code: {reason}",
            hint="save the weights alone: torch.save(model.state_dict(), FILE), or as safetensors",
        ) from exc
    except Exception as exc:
        if "TorchScript" in str(exc):
            raise InputError(
                f"{path} is a TorchScript archive, not a weights file",
                hint="save the weights alone: torch.save(model.state_dict(), FILE)",
            ) from exc
        raise InputError(f"{path} is damaged or not a PyTorch file: {first_line(exc)}") from exc


def _find_tensors(loaded: object, depth: int = 0) -> _Found | None:
    """Unwrap a checkpoint down to its mapping of names to tensors; None where it has none."""
    if not isinstance(loaded, Mapping) or depth == _MOST_NESTED:
        return None
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    averaged = [k for k in loaded if isinstance(k, str) and _AVERAGED_KEY.search(k)]
    # Several tensors with dimensions are weights, and what lies beside them is something else.
    flat = sum(tensor.dim() > 0 for tensor in tensors.values()) > 1
    for key in () if flat else (*_NESTED_KEYS, *averaged):
        inner = _find_tensors(loaded.get(key), depth + 1)
        if inner is not None:
            entry = f"{key}.{inner.entry}" if inner.entry else key
            beside = (k for k in averaged if key not in averaged and _find_tensors(loaded[k], depth + 1))
            return _Found(inner.tensors, entry, inner.averaged or next(beside, ""))
    if not tensors:
        return None
    return _Found(tensors, averaged=next((k for k in averaged if _find_tensors(loaded[k], depth + 1)), ""))


def _no_weights(loaded: object, path: Path) -> InputError:
    found = (
        ", ".join(map(str, list(loaded)[:_LISTED])) if isinstance(loaded, Mapping) else type(loaded).__name__
    )
    return InputError(
        f"{path} holds no weights (found: {found or 'nothing'})",
        hint=f"expected tensors at the top level or under one of: {', '.join(_NESTED_KEYS)}, ema",
    )
