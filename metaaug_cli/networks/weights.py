"""Weights files: read without executing code, fitted to a network, fetched once, and hashed."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import pickle
import re
import tempfile
import urllib.error
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metaaug_cli.errors import InputError

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "params", "module", "model_ema")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
_DERIVED_SUFFIX = ".num_batches_tracked"
_LISTED = 5
_MOST_NESTED = 8
_TIMEOUT_S = 15
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


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file.

    A checkpoint that nests its weights (under ``state_dict``, ``model`` and the like) is unwrapped.
    Pickled files go through PyTorch's restricted loader, so no code in them runs.

    Raises:
        InputError: No such file, a damaged file, one that needs code to load, or one without tensors.
    """
    if not path.is_file():
        raise InputError(f"no weights file at {path}", hint="check the path given to --weights")
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as exc:
            raise InputError(f"{path} is not a readable safetensors file: {exc}") from exc
    if path.suffix.lower() not in _PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is not a weights file that can be read",
            hint="weights come as .safetensors, .pt or .pth",
        )
    return _dense(_tensors_of(_restricted_load(path), path), path)


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
        raise InputError(f"{path} is damaged or not a PyTorch file: {_first_line(exc)}") from exc


def _tensors_of(loaded: object, path: Path, depth: int = 0) -> StateDict:
    """Unwrap a checkpoint down to its mapping of names to tensors."""
    if isinstance(loaded, Mapping) and depth < _MOST_NESTED:
        tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = next((k for k in _NESTED_KEYS if isinstance(loaded.get(k), Mapping)), None)
        if inner is not None and len(tensors) < 2:
            _logger.info("%s: weights taken from its %r entry", path.name, inner)
            return _tensors_of(loaded[inner], path, depth + 1)
        if tensors:
            return tensors
    found = (
        ", ".join(map(str, list(loaded)[:_LISTED])) if isinstance(loaded, Mapping) else type(loaded).__name__
    )
    raise InputError(
        f"{path} holds no weights (found: {found or 'nothing'})",
        hint=f"expected tensors at the top level or under one of: {', '.join(_NESTED_KEYS)}",
    )


def tensors_in(module: nn.Module) -> StateDict:
    """The tensors of a module's state; extra state of other types, which some modules keep, left out."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def fit_names(state: StateDict, expected: Iterable[str]) -> StateDict:
    """Strip wrapper prefixes (``module.``, ``_orig_mod.``, ...) where that makes more names match."""
    names = set(expected)
    while True:
        matched = len(names & state.keys())
        best = state
        for prefix in _WRAPPER_PREFIXES:
            stripped = {k.removeprefix(prefix): v for k, v in state.items()}
            if len(names & stripped.keys()) > matched or (matched == 0 and _all_start(state, prefix)):
                best = stripped
                break
        if best is state:
            return state
        state = best


def _all_start(state: StateDict, prefix: str) -> bool:
    return bool(state) and all(name.startswith(prefix) for name in state)


def apply_state_dict(module: nn.Module, state: StateDict, source: str, *, ignore: str | None = None) -> None:
    """Load weights into a module, or list everything that does not fit.

    Args:
        module: The network; its parameters and buffers are overwritten in place.
        state: Weights by name; wrapper prefixes are stripped.
        source: What to call the weights in an error.
        ignore: Regular expression of names that may be in the file and not in the network.

    Raises:
        InputError: Missing, unexpected or mis-shaped entries.
    """
    own = tensors_in(module)
    state = fit_names(state, own)
    if ignore is not None:
        state = {k: v for k, v in state.items() if k in own or not re.match(ignore, k)}
    missing = [k for k in own if k not in state and not k.endswith(_DERIVED_SUFFIX)]
    unexpected = [k for k in state if k not in own and not k.endswith(_DERIVED_SUFFIX)]
    misshaped = [
        f"{k}: file {_shape(state[k])}, network {_shape(own[k])}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    mistyped = [
        f"{k}: file {_plain_type(state[k])}, network {_plain_type(own[k])}"
        for k in own
        if k in state and own[k].is_floating_point() and not state[k].is_floating_point()
    ]
    problems = [
        text
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
            ("of another type", mistyped),
        )
        if (text := _listing(kind, names))
    ]
    if problems:
        raise InputError(
            f"{source} does not fit the network\n" + "\n".join(problems),
            hint="check that --weights belongs to this very network (same variant, same number of classes)",
        )
    matching = OrderedDict((k, v) for k, v in state.items() if k in own)
    # Modules that changed their layout read their version here; the shapes were just compared.
    matching._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(matching, strict=False)


def resized_head(module: nn.Module, state: StateDict) -> int | None:
    """Number of classes of weights that fit a network in all but its number of outputs.

    Returns:
        The other class count when every mis-shaped entry differs in its first axis alone and all
        agree on both sizes; ``None`` otherwise.
    """
    own = module.state_dict()
    state = fit_names(state, own)
    pairs = [(state[k].shape, own[k].shape) for k in own if k in state and state[k].shape != own[k].shape]
    if not pairs or any(new[1:] != old[1:] or not new for new, old in pairs):
        return None
    sizes = {(new[0], old[0]) for new, old in pairs}
    return sizes.pop()[0] if len(sizes) == 1 else None


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted (name, dtype, shape, bytes) of a state dict, as hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_weights(url: str) -> Path:
    """The file behind a weights URL: from PyTorch's hub cache, else downloaded into it.

    The cache is ``$TORCH_HOME/hub/checkpoints``. A file name that carries a hash is checked.

    Raises:
        InputError: The file is neither cached nor reachable; names the file wanted.
    """
    name = PurePosixPath(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        _logger.info("downloading %s", name)
        _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response,
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file,
        ):
            partial = Path(file.name)
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        expected = re.search(r"-([0-9a-f]{8,})\.", path.name)
        if expected and not digest.hexdigest().startswith(expected.group(1)):
            raise InputError(f"the download of {path.name} is damaged (its hash differs)", hint="try again")
        os.replace(partial, path)
        partial = None
    except (OSError, urllib.error.URLError) as exc:
        raise weights_not_reachable(path.name, f"put it into {path.parent}", exc) from exc
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def weights_not_reachable(wanted: str, alternative: str, cause: Exception) -> InputError:
    """The error for weights that are neither cached nor downloadable."""
    return InputError(
        f"weights not at hand: {wanted} is not cached and could not be downloaded ({_first_line(cause)})",
        hint=f"fetch {wanted} on a machine with a network and pass --weights FILE, or {alternative}",
    )


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__


def _plain_type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listing(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"  {len(names)} {kind}: " + ", ".join(names[:_LISTED]) + more
