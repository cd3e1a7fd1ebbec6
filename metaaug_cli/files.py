"""Where files go, and writing them so that a reader sees the old content or the new, never half of it."""

import contextlib
import os
from pathlib import Path

from metaaug_cli.errors import InputError


def require_writable(path: Path) -> None:
    """Refuse a place where no file can be written, before any work is done for it.

    Raises:
        InputError: It is a folder, or the nearest folder above it that exists is none or read-only.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder", hint="name a file")
    above = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written into" if above.is_dir() else "is not a folder"
        raise InputError(f"cannot write {path}: {above} {reason}", hint="name a file in a writable folder")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file by replacing it in one step; text is UTF-8.

    A link's target is replaced, not the link; what is no regular file (a pipe, ``/dev/stdout``) is written
    to.

    Raises:
        InputError: The folder does not exist or may not be written.
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    target = path.resolve() if path.is_symlink() else path
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if _is_device(path):
            path.write_bytes(data)
            return
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"cannot write {path}: {exc.strerror}", hint="name a file in a folder that exists and is writable"
        ) from exc


def _is_device(path: Path) -> bool:
    return path.exists() and (not path.is_file() or path.absolute().is_relative_to("/dev"))


def cache_directory() -> Path | None:
    """Where results are kept for later runs: ``$METAAUG_CACHE``, else ``metaaug`` in the user's cache.

    None where the user has no home directory and names no other.
    """
    if chosen := os.environ.get("METAAUG_CACHE"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "metaaug"
    try:
        return Path.home() / ".cache" / "metaaug"
    except RuntimeError:
        return None
