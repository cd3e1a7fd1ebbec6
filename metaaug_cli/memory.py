"""Memory: the C allocator's settings for long CPU runs, what is left to take, and the most that was held."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 1 << 30
_UNKNOWN_FREE = 8 << 30
_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the folder below which a kernel's memory groups lie (version 2, version 1): limit, use, cache in use."""


def keep_freed_memory() -> bool:
    """Let glibc reuse freed tensors of up to 1 GiB instead of returning them to the system at once.

    Without it every activation above 32 MiB is mapped and zeroed anew, which takes most of the time of large
    blocks (see docs/benchmarks.md). Sets the whole process, so only commands call it, never the library.

    Returns:
        Whether the allocator took the settings; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def free_memory_bytes(system: Path = Path("/")) -> int:
    """Bytes that this process can still take: what is free, or what its container (cgroup) has left.

    Args:
        system: Where ``proc`` and ``sys`` are.
    """
    free = [_UNKNOWN_FREE]
    try:
        lines = (system / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")] or free
    except (OSError, ValueError):
        pass
    return max(0, min(free + _left_in_groups(system)))


def _left_in_groups(system: Path) -> list[int]:
    """What each memory group of the process, and each that holds it, has left below its limit."""
    try:
        groups = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else ""
        if controllers and not kind:
            continue
        root = system / "sys/fs/cgroup" / kind
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and (room := _left_in(folder, *_GROUP_FILES[kind])) is not None:
                left.append(room)
    return left


def _left_in(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Limit less use, which counts files in memory that the kernel drops on demand; None without a limit."""
    try:
        most, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        return most - taken + int(dict(line.split() for line in lines).get(cached, 0))
    except (OSError, ValueError):  # no such group, or the word "max"
        return None


def peak_memory_mib() -> int | None:
    """The most memory this process has held, in MiB; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def peak_gpu_memory_mib() -> int | None:
    """The most GPU memory that this process has taken for tensors, in MiB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_reserved() // 2**20
