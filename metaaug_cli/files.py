"""Where files go, holding one, and writing so that a reader sees the old content or the new, never half."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from metaaug_cli.errors import InputError, UsageError

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None  # type: ignore[assignment]

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def require_writable(path: Path) -> None:
    """Refuse a place where no file can be written, before any work is done for it.

    Raises:
        InputError: It is a folder, or the nearest folder above it that exists is none or read-only.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder", hint="name a file")
    if _is_device(path):
        return
    target = path.resolve() if path.is_symlink() else path
    above = next((p for p in target.absolute().parents if p.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written into" if above.is_dir() else "is not a folder"
        raise InputError(f"cannot write {path}: {above} {reason}", hint="name a file in a writable folder")


def require_report_place(flag: str, path: Path) -> None:
    """Refuse a report that could not be written once the work is done.

    Raises:
        UsageError: Its folder does not exist.
        InputError: As for :func:`require_writable`.
    """
    if not path.parent.is_dir():
        raise UsageError(
            f"{flag} {path}: there is no folder {path.parent}",
            hint="name a file in a folder that exists and is writable",
        )
    require_writable(path)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a file for this process alone; gives whether no other process holds it.

    A process that ends, however it does, lets go. Where the system or the file system has no locks, nobody
    is ever found to hold the file.

    Args:
        path: Made where it does not exist.
    """
    with path.open("ab") as file:
        held = True
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # this file system has no locks
            pass
        yield held


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file by replacing it in one step; text is UTF-8.

    A link's target is replaced, not the link; what is no regular file (a pipe, ``/dev/stdout``) is written
    to.

    Raises:
        InputError: The folder does not exist or may not be written.
        OSError: The disk is full.
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
        raise not_written(path, exc) from exc


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Where to write a file that takes ``path``'s place in one step, for writers that ask for a path.

    Folders above it are made.

    Raises:
        InputError: It cannot be written.
        OSError: The disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial, usual = Path(folder) / "partial", Path(folder) / "usual"
            yield partial
            usual.touch()
            shutil.copymode(usual, partial)  # safetensors lets nobody but the owner read what it writes
            os.replace(partial, path)
    except (OSError, SafetensorError) as exc:
        raise not_written(path, exc) from exc


def not_written(path: Path, error: OSError | SafetensorError) -> OSError | InputError:
    """What to raise for a failed write: a full disk is the machine's fault, all else that of the place."""
    in_words = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_words[1]) if in_words else None
    if number in DISK_FULL:
        return OSError(number, os.strerror(number), str(path))
    reason = os.strerror(number) if number else str(error)
    return InputError(
        f"cannot write {path}: {reason}", hint="name a file in a folder that exists and is writable"
    )


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
