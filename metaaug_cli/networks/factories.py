"""Networks that the user's own Python file builds: ``FILE.py:FACTORY``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from metaaug_cli.errors import InputError
from metaaug_cli.networks.weights import hash_state

_LISTED = 8


def build_from_file(path: Path, factory: str) -> nn.Module:
    """Import a Python file and call its factory without arguments.

    The file's own folder is importable meanwhile, so that it can import its neighbours. Random
    initial weights are the same on every call.

    Args:
        path: The Python file. It is the user's own code and is executed.
        factory: Name of a function or class in it that returns an ``nn.Module``, or of a module object.

    Raises:
        InputError: No such file or factory, the code raises, or what it returns is not a module.
    """
    if not path.is_file():
        raise InputError(f"no Python file at {path}", hint="MODEL is FILE.py:FACTORY")
    with _importable(path.parent):
        return _built(_attribute(_import(path), factory, path), path, factory, seed=0)


def has_own_weights(module: nn.Module, path: Path, factory: str) -> bool:
    """Whether a factory loads weights itself: then another random seed gives the same network."""
    with _importable(path.parent):
        again = _built(_attribute(_import(path), factory, path), path, factory, seed=1)
    return hash_state(module.state_dict()) == hash_state(again.state_dict())


def plain_module(module: nn.Module, name: str) -> nn.Module:
    """The network itself, out of what wraps it to run elsewhere (``torch.compile``, ``DataParallel``).

    Args:
        module: What the user's code built.
        name: For messages.

    Raises:
        InputError: It is, or holds, TorchScript, whose Python code is gone, or lazy layers without shapes.
    """
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            break
    for place, part in module.named_modules():
        where = f" ({place})" if place else ""
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(
                f"{name} holds TorchScript{where}, which torch.export cannot trace",
                hint="return the Python network it was scripted from",
            )
        if any(is_lazy(p) for p in part.parameters(recurse=False)):
            raise InputError(
                f"{name} holds a lazy layer without a shape{where}",
                hint="run the network once on an image in the factory, or name its sizes",
            )
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _import(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"metaaug_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as Python", hint="MODEL is FILE.py:FACTORY")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        sys.modules.pop(name, None)
        raise _user_error(f"importing {path}", exc, path) from exc
    return module


def _attribute(module: ModuleType, factory: str, path: Path) -> object:
    found = getattr(module, factory, None)
    if factory and callable(found):
        return found
    offered = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "") == module.__name__
    ]
    close = difflib.get_close_matches(factory, offered, n=3)
    shown = ", ".join(close or offered[:_LISTED]) or "nothing callable"
    problem = f"{path} defines no factory {factory!r}" if factory else f"{path} needs the name of a factory"
    raise InputError(problem, hint=f"MODEL is FILE.py:FACTORY; this file offers: {shown}")


def _built(factory: object, path: Path, name: str, *, seed: int) -> nn.Module:
    if isinstance(factory, nn.Module):
        return plain_module(factory, name)
    if not callable(factory):
        raise InputError(f"{name} in {path} is not callable")
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            built = factory()
    except (Exception, SystemExit) as exc:
        raise _user_error(f"calling {name}() of {path}", exc, path) from exc
    if not isinstance(built, nn.Module):
        raise InputError(
            f"{name}() of {path} returned {type(built).__name__}, not a torch.nn.Module",
            hint="the factory must return the network alone",
        )
    return plain_module(built, f"{name}() of {path}")


def _user_error(doing: str, exc: BaseException, path: Path) -> InputError:
    """The user's exception with the last line of their own file that it came through."""
    if isinstance(exc, SyntaxError):
        line = exc.lineno
    else:
        frames = traceback.extract_tb(exc.__traceback__)
        line = next(
            (f.lineno for f in reversed(frames) if Path(f.filename).resolve() == path.resolve()), None
        )
    where = f" (line {line})" if line else ""
    hint = None
    if isinstance(exc, TypeError) and "required" in str(exc) and "argument" in str(exc):
        hint = "the factory is called without arguments; give them defaults or write a small factory"
    elif isinstance(exc, ModuleNotFoundError):
        hint = "install what the file imports into the same environment, or put it beside the file"
    return InputError(f"{doing} raised {type(exc).__name__}{where}: {exc}", hint=hint)
