"""Weights: fitted to a network, fetched once, and hashed."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from metaaug_cli.errors import InputError

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

_WRAPPER_PREFIXES = (
    "module.",
    "model.",
    "_model.",
    "net.",
    "network.",
    "backbone.",
    "encoder.",
    "classifier.",
)
_INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_BOOKKEEPING = re.compile(r"^n_averaged$|(^|\.)total_(ops|params)$")  # of AveragedModel, and of thop
_DERIVED_SUFFIX = ".num_batches_tracked"
_LISTED = 5
_TIMEOUT_S = 15


def tensors_in(module: nn.Module) -> StateDict:
    """The tensors of a module's state; extra state of other types, which some modules keep, left out."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _fitted(state: StateDict, expected: Iterable[str]) -> tuple[StateDict, list[str]]:
    """The state without wrapper prefixes (``module.``, ...) where that makes more names match.

    Where every name that is expected lies under one prefix, what lies outside it (the loss of a training
    module, a second network) is no part of the network: it is left out, and its names are returned.
    """
    names = set(expected)
    for wrapper in _INNER_WRAPPERS:
        if not any(wrapper in name for name in names):
            state = {k.replace(wrapper, ""): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in names or not _BOOKKEEPING.search(k)}
    left_out: list[str] = []
    while True:
        matched = len(names & state.keys())
        complete = [p for p in _WRAPPER_PREFIXES if _is_complete(state, p, names)]
        for prefix in _WRAPPER_PREFIXES:
            under = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
            alone = complete == [prefix]  # under two of them, nobody can tell which network is meant
            stripped = under | {k: v for k, v in outside.items() if k in names or not alone}
            if len(names & stripped.keys()) > matched or (matched == 0 and len(under) > len(outside)):
                left_out += [k for k in outside if k not in stripped]
                state = stripped
                break
        else:
            return state, left_out


def _is_complete(state: StateDict, prefix: str, names: set[str]) -> bool:
    return all(prefix + name in state or name.endswith(_DERIVED_SUFFIX) for name in names)


def apply_state_dict(module: nn.Module, state: StateDict, source: str, *, ignore: str | None = None) -> None:
    """Load weights into a module, or list everything that does not fit.

    Args:
        module: The network; its parameters and buffers are overwritten in place.
        state: Weights by name. Wrapper prefixes are stripped, entries outside them left out with a warning.
            One name is enough for tensors that the network uses under several.
        source: What to call the weights in a message.
        ignore: Regular expression of names that may be in the file and not in the network.

    Raises:
        InputError: Missing, unexpected or mis-shaped entries.
    """
    own = tensors_in(module)
    state, left_out = _fitted(state, own)
    if ignore is not None:
        state = {k: v for k, v in state.items() if k in own or not re.match(ignore, k)}
    _require_fit(own, state, source)
    if left_out:
        _logger.warning(
            "%s: not all is of this network; left out are\n%s", source, _listing("others", left_out)
        )
    matching = OrderedDict((k, v) for k, v in state.items() if k in own)
    # Modules that changed their layout read their version here; the shapes were just compared.
    matching._metadata = getattr(module.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    module.load_state_dict(matching, strict=False)


def _require_fit(own: StateDict, state: StateDict, source: str) -> None:
    given = {_place(own[k]) for k in own if k in state}
    missing = [
        k for k in own if k not in state and not k.endswith(_DERIVED_SUFFIX) and _place(own[k]) not in given
    ]
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
        hint = "check that --weights belongs to this very network (same variant, same number of classes)"
        if len(problems) == 1 and unexpected:
            hint = (
                "every weight of the network is there, so the file is of a larger one; "
                "if those entries are no part of the network, save a file without them"
            )
        raise InputError(f"{source} does not fit the network\n" + "\n".join(problems), hint=hint)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """The same for two tensors exactly where they are one in memory."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def resized_head(module: nn.Module, state: StateDict) -> int | None:
    """Number of classes of weights that fit a network in all but its number of outputs.

    Returns:
        The other class count when every mis-shaped entry differs in its first axis alone and all
        agree on both sizes; ``None`` otherwise.
    """
    own = tensors_in(module)
    state, _ = _fitted(state, own)
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
        f"weights not at hand: {wanted} is not cached and could not be downloaded ({first_line(cause)})",
        hint=f"fetch {wanted} on a machine with a network and pass --weights FILE, or {alternative}",
    )


def first_line(exc: BaseException) -> str:
    """The first line of an exception's text, or its type."""
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
