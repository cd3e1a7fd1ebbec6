"""Load ``torch.export`` archives without giving them a chance to execute code.

PyTorch's own loader unpickles some members, hands size expressions to a parser that evaluates
Python, resolves operator names by attribute look-up, and compiles stored guards. So an archive is
first read with ``zipfile``, checked against what a plain exported network needs, and rewritten into
a fresh archive in memory; only that copy reaches the loader, which also rules out tricks that rest
on two zip readers seeing different members.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from metaaug_cli.errors import InputError

_ROOT = "archive"
_SYMBOL = re.compile(r"[a-z]+\d+")
_EXPRESSION_TOKEN = re.compile(
    r"\s*(?:([A-Za-z_]\w*)|\d+(?:\.\d+)?|'[a-z]+\d+'|'-?\d+(?:\.\d+)?'|\*\*|//|[<>=!]=|[-+*/%(),<>~&|=])"
)
_EXPRESSION_NAMES = {
    "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt",
    "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow", "ToFloat", "TruncToInt", "RoundToInt",
    "True", "False", "oo", "int_oo", "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
    "positive", "negative", "nonnegative", "integer", "real", "finite", "precision",
}  # fmt: skip
_OPERATORS = [
    re.compile(r"torch\.ops\.(aten|prims|torchvision)\.(?!__(?!\w*and|\w*or|\w*xor|\w*shift))\w+\.\w+"),
    re.compile(r"torch\.ops\.higher_order\.[a-z]\w+"),
    re.compile(r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_)"),
    re.compile(r"torch\.sym_[a-z]\w+"),
    re.compile(r"math\.(ceil|floor|trunc)"),
]
_RESAVE = "save it again with torch.export.save(torch.export.export(...), FILE) and plain tensors only"


def load_program(path: Path) -> ExportedProgram:
    """Load an exported program whose archive holds tensors and a graph, nothing executable.

    Args:
        path: A ``.pt2`` file written by ``torch.export.save``.

    Raises:
        InputError: No such file, not such an archive, or one that would execute code to load.
    """
    if not path.is_file():
        raise InputError(f"no exported program at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
    # zipfile raises RuntimeError for an encrypted member, NotImplementedError for an unknown compression.
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as exc:
        raise InputError(
            f"{path} is not a readable .pt2 archive: {exc}", hint="write it with torch.export.save"
        ) from exc
    clean = {name: _checked(name, data, path) for name, data in members.items()}
    return _load(_rewritten(clean), path)


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, bytes]:
    """Members by name below the archive's root folder."""
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if len(set(names)) != len(names):
        raise InputError(f"{path} lists a member twice; refusing to guess which one counts")
    root = next((n.removesuffix("archive_format") for n in names if n.endswith("/archive_format")), None)
    if root is None or not any(n.startswith(f"{root}models/") for n in names):
        kind = "an older .pt2 format" if "version" in names else "not a torch.export archive"
        raise InputError(f"{path} is {kind}", hint=f"with torch {torch.__version__}, {_RESAVE}")
    return {n.removeprefix(root): archive.read(n) for n in names if n.startswith(root)}


def _checked(name: str, data: bytes, path: Path) -> bytes:
    """One member's bytes as they may be loaded.

    Raises:
        InputError: The member would be executed, unpickled or compiled.
    """
    if name in {"archive_format", "archive_version", "version", "byteorder"} or name.startswith(".data/"):
        return data
    if name.startswith("data/sample_inputs/"):
        return b""  # pickled, and not needed
    if name.startswith("models/") and name.endswith(".json"):
        return _checked_graph(data, path)
    if re.fullmatch(r"data/(weights|constants)/\w+_config\.json", name):
        return _checked_payload(data, path)
    if re.fullmatch(r"data/(weights/weight|constants/tensor)_\d+", name) or name.startswith("extra/"):
        return data
    raise InputError(f"{path} holds {name}, which PyTorch would load by executing it", hint=_RESAVE)


def _checked_payload(data: bytes, path: Path) -> bytes:
    for name, entry in _json(data, path).get("config", {}).items():
        location = str(entry.get("path_name", ""))
        if entry.get("use_pickle") is not False or not re.fullmatch(r"(weight|tensor)_\d+", location):
            raise InputError(f"{path} stores {name} as a pickle, which can execute code", hint=_RESAVE)
    return data


def _checked_graph(data: bytes, path: Path) -> bytes:
    program = _json(data, path)
    program["guards_code"] = []  # Python source that the loader would compile
    for key, value in _entries(program):
        if key == "expr_str" and not _is_plain_expression(value):
            raise InputError(f"{path} has a size expression that is not arithmetic: {value!r}")
        if key == "target" and not any(p.fullmatch(str(value)) for p in _OPERATORS):
            raise InputError(
                f"{path} calls {value!r}, which is not a PyTorch operator of a plain network",
                hint="custom operators cannot be quantized; export the network without them",
            )
    for symbol in program.get("range_constraints", {}):
        if not _is_plain_expression(symbol):
            raise InputError(f"{path} has a size expression that is not arithmetic: {symbol!r}")
    return json.dumps(program).encode()


def _is_plain_expression(text: object) -> bool:
    """Whether a size expression is arithmetic on symbols, like ``s77 + 1`` or ``Symbol('s77')``."""
    if not isinstance(text, str):
        return False
    position = 0
    while position < len(text.rstrip()):
        token = _EXPRESSION_TOKEN.match(text, position)
        if token is None:
            return False
        word = token.group(1)
        if word and word not in _EXPRESSION_NAMES and not _SYMBOL.fullmatch(word):
            return False
        position = token.end()
    return True


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) pair of nested JSON objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise InputError(f"{path} is damaged: {exc}") from exc
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: an object was expected")
    return value


def _rewritten(members: dict[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(f"{_ROOT}/{name}", data)
    buffer.seek(0)
    return buffer


def _load(buffer: io.BytesIO, path: Path) -> ExportedProgram:
    torch_logger = logging.getLogger("torch.export")
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(buffer)
    except Exception as exc:  # the loader raises many kinds; all mean "not loadable here"
        raise InputError(
            f"{path} could not be loaded by torch {torch.__version__}: {exc}",
            hint="save it again with this version of torch",
        ) from exc
    finally:
        torch_logger.setLevel(level)
