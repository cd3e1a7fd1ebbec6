"""Networks that the user's own Python file builds: ``FILE.py:FACTORY``."""

from __future__ import annotations

import contextlib
import difflib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from metaaug_cli.errors import InputError
from metaaug_cli.networks.user_files import (
    import_file,
    importable,
    importable_in_forward,
    neighbours_afresh,
    process_kept,
    without_inference_tensors,
)
from metaaug_cli.networks.weights import hash_state, tensors_in

_LISTED = 8


def build_from_file(path: Path, factory: str, *, ask_weights: bool = False) -> tuple[nn.Module, bool]:
    """Import a Python file and call its factory without arguments.

    The file's own folder is importable meanwhile and whenever the network runs, so that both can import
    their neighbours. Random initial weights are the same on every call. The working folder and torch's
    defaults are afterwards what they were.

    Args:
        path: The Python file. It is the user's own code and is executed.
        factory: Name of a function or class in it that returns an ``nn.Module``, or of a module object.
        ask_weights: Find out whether the factory loads weights itself, for which the file is executed again
            where it can be, and else the factory called again.

    Returns:
        The network, and whether its weights are the factory's own, not random; false unless asked.

    Raises:
        InputError: No such file or factory, the code raises, or what it returns is not a module that can
            be quantized.
    """
    if not path.is_file():
        raise InputError(f"no Python file at {path}", hint="MODEL is FILE.py:FACTORY")
    absolute = path.resolve()
    with process_kept(), importable(absolute):
        file = _UserFile.executed(path, absolute, seed=0)
        module = file.build(factory, seed=0)
        own = ask_weights and _has_own_weights(module, file, factory)
    importable_in_forward(module, absolute)
    return without_inference_tensors(module), own


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed inside; the generators of before afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class _UserFile:
    """An executed file.

    Args:
        path: As the user wrote it, for messages.
        absolute: The same whatever the working folder is.
        module: What it defined.
        known: Modules that were imported before it.
        drew_numbers: Whether executing it took random numbers.
    """

    path: Path
    absolute: Path
    module: ModuleType
    known: set[str]
    drew_numbers: bool

    @classmethod
    def executed(cls, path: Path, absolute: Path, *, seed: int) -> _UserFile:
        known = set(sys.modules)
        with seeded(seed):
            before = torch.get_rng_state()
            try:
                module = import_file(absolute)
            except InputError:
                raise
            except (Exception, SystemExit) as exc:
                raise _user_error(f"importing {path}", exc, absolute) from exc
            drew_numbers = not torch.equal(before, torch.get_rng_state())
        return cls(path, absolute, module, known, drew_numbers)

    def build(self, name: str, *, seed: int) -> nn.Module:
        """The network of one of its factories."""
        factory = _attribute(self.module, name, self.path)
        if isinstance(factory, nn.Module):
            return plain_module(factory, name)
        if not callable(factory):
            raise InputError(f"{name} in {self.path} is not callable")
        try:
            with seeded(seed):
                built = factory()
        except (Exception, SystemExit) as exc:
            raise _user_error(f"calling {name}() of {self.path}", exc, self.absolute) from exc
        if not isinstance(built, nn.Module):
            raise InputError(
                f"{name}() of {self.path} returned {type(built).__name__}, not a torch.nn.Module",
                hint="the factory must return the network alone",
            )
        return plain_module(built, f"{name}() of {self.path}")


def _has_own_weights(module: nn.Module, file: _UserFile, factory: str) -> bool:
    """Whether another random seed gives the same weights, in a network of its own.

    The file is executed again for that: a second call of the same factory may change what the first made.
    Neighbours are executed again where numbers were drawn outside the factory, perhaps by them.
    """
    digest = hash_state(tensors_in(module))
    try:
        other = _UserFile.executed(file.path, file.absolute, seed=1)
        same = hash_state(tensors_in(other.build(factory, seed=1))) == digest
    except InputError:  # what registers itself can be executed once only
        return _gives_the_same_again(file, factory, digest)
    if same and file.drew_numbers:
        with neighbours_afresh(file.absolute, file.known), contextlib.suppress(InputError):
            other = _UserFile.executed(file.path, file.absolute, seed=1)
            return hash_state(tensors_in(other.build(factory, seed=1))) == digest
    return same


def _gives_the_same_again(file: _UserFile, factory: str, digest: str) -> bool:
    """Whether another call with another seed gives the same weights; taken for granted where it fails."""
    with contextlib.suppress(InputError):
        return hash_state(tensors_in(file.build(factory, seed=1))) == digest
    return True


def plain_module(module: nn.Module, name: str) -> nn.Module:
    """The network itself, out of what wraps it to run elsewhere (``torch.compile``, ``DataParallel``).

    Args:
        module: What the user's code built.
        name: For messages.

    Raises:
        InputError: It is, or holds, TorchScript, whose Python code is gone, lazy layers without shapes, or
            tensors without values or sparse ones.
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
    _require_dense(module, name)
    return module


def _require_dense(module: nn.Module, name: str) -> None:
    for key, tensor in tensors_in(module).items():
        if tensor.is_meta:
            raise InputError(
                f"{name} was built without values (meta device): {key}",
                hint="build it on the CPU, or load its weights in the factory",
            )
        if tensor.layout != torch.strided:
            raise InputError(
                f"{name} holds sparse weights: {key}", hint="return a network with dense weights (to_dense())"
            )


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
