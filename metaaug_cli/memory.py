"""The C allocator's settings for long CPU runs, and the most memory that a process has held."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 1 << 30


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
