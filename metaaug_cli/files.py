"""Writing files so that a reader sees the old content or the new, never half of it."""

import contextlib
import os
from pathlib import Path

from metaaug_cli.errors import InputError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file by replacing it in one step; text is UTF-8.

    Raises:
        InputError: The folder does not exist or may not be written.
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"cannot write {path}: {exc.strerror}", hint="name a file in a folder that exists and is writable"
        ) from exc
