"""Running a user's Python file: its neighbours can be imported, and the process stays as it was."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metaaug_cli.errors import InputError


@contextlib.contextmanager
def importable(path: Path) -> Iterator[None]:
    """Let a file's folder be imported from; of a file in a package, the package's folder too."""
    entries = _entries(path)
    _enter(entries)
    try:
        yield
    finally:
        _leave(entries)


def importable_in_forward(module: nn.Module, path: Path) -> None:
    """Let a network import from its file's folder whenever it runs, and only then."""
    entries = _entries(path)
    module.register_forward_pre_hook(lambda *_: _enter(entries), prepend=True)
    module.register_forward_hook(lambda *_: _leave(entries), always_call=True)


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Undo what code inside leaves behind: working folder, default dtype and device, gradients off."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    folder = None
    with contextlib.suppress(FileNotFoundError):  # a shell may stand in a folder that was deleted
        folder = os.getcwd()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
            with contextlib.suppress(OSError):  # one that cannot be entered again was hardly left
                if folder is not None and folder != os.getcwd():
                    os.chdir(folder)


@contextlib.contextmanager
def neighbours_afresh(path: Path, known: set[str]) -> Iterator[None]:
    """Let a file's neighbours be executed again inside; afterwards those of before are back.

    Args:
        path: The file.
        known: Names of modules that stay as they are.
    """
    folders = [Path(entry) for entry in _entries(path)]
    kept = {
        name: module
        for name, module in sys.modules.items()
        if name not in known and _is_source_below(module, folders)
    }
    for name in kept:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(kept)


def import_file(path: Path) -> ModuleType:
    """Execute a Python file as a module; one with relative imports as a part of its package.

    Args:
        path: The file, absolute.

    Raises:
        InputError: It is not a Python file.
        Exception: Whatever its code raises.
    """
    try:
        return _executed(_spec(_unique(path, path.stem), path))
    except ImportError as error:
        if "no known parent package" not in str(error):
            raise
    return _import_in_package(path, _relative_level(path))


def _spec(name: str, path: Path) -> ModuleSpec:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise InputError(f"{path} cannot be imported as Python", hint="MODEL is FILE.py:FACTORY")
    return spec


def without_inference_tensors(module: nn.Module) -> nn.Module:
    """The network, with ordinary copies of what was made under ``torch.inference_mode``."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for holder in holders:
            for name, value in holder.items():
                if isinstance(value, Tensor) and value.is_inference():
                    if id(value) not in copies:
                        copy = value.clone()
                        copies[id(value)] = nn.Parameter(copy) if isinstance(value, nn.Parameter) else copy
                    holder[name] = copies[id(value)]
    return module


def _entries(path: Path) -> list[str]:
    folder = path.resolve().parent
    package = _package_root(folder)
    return [str(folder)] if package is None else [str(folder), str(package.parent)]


def _enter(entries: list[str]) -> None:
    sys.path[:0] = entries


def _leave(entries: list[str]) -> None:
    for entry in entries:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _package_root(folder: Path) -> Path | None:
    """The outermost package that a folder belongs to."""
    root = None
    while (folder / "__init__.py").is_file():
        root, folder = folder, folder.parent
    return root


def _is_source_below(module: ModuleType, folders: list[Path]) -> bool:
    file = Path(getattr(module, "__file__", None) or "")
    # An environment inside the folder is not the user's code, and compiled modules load only once.
    if file.suffix != ".py" or "site-packages" in file.parts:
        return False
    return any(folder in file.parents for folder in folders)


def _relative_level(path: Path) -> int:
    """How many folders up the relative imports of a file reach that has some."""
    tree = ast.parse(path.read_bytes())
    return max(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))


def _import_in_package(path: Path, level: int) -> ModuleType:
    root = path.parents[min(level, len(path.parents)) - 1]
    root = _package_root(root) or root
    package = _package_name(root, path)
    *folders, stem = path.relative_to(root).with_suffix("").parts
    parent = ".".join((package, *folders))
    name = f"{parent}.{stem}"
    sys.modules.pop(name, None)
    if package not in sys.modules:
        spec: ModuleSpec | None = None
        if (root / "__init__.py").is_file():
            spec = importlib.util.spec_from_file_location(
                package, root / "__init__.py", submodule_search_locations=[str(root)]
            )
        if spec is None:
            spec = ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations = [str(root)]
        _executed(spec)
    if "." not in stem:
        return importlib.import_module(name)
    importlib.import_module(parent)
    return _executed(_spec(f"{parent}.{stem.replace('.', '_')}", path))


def _package_name(root: Path, path: Path) -> str:
    """The folder's own name, as its files may use it too, unless another module goes by it."""
    name = root.name
    loaded = sys.modules.get(name)
    if loaded is not None:
        places = list(getattr(loaded, "__path__", ()))
    else:
        elsewhere = [entry for entry in sys.path if entry not in _entries(path)]
        found = PathFinder.find_spec(name, elsewhere)
        places = [str(root)] if found is None else list(found.submodule_search_locations or ())
    free = name.isidentifier() and name not in sys.stdlib_module_names
    return name if free and root in [Path(p).resolve() for p in places] else _unique(root, name)


def _unique(path: Path, name: str) -> str:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return f"metaaug_user_{name.replace('.', '_')}_{digest}"


def _executed(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up there
    try:
        if spec.loader is not None:
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module
