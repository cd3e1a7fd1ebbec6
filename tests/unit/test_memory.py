"""The allocator setting and the peak it is judged by."""

import sys

import numpy as np
import pytest

from metaaug_cli.memory import keep_freed_memory, peak_memory_mib


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's, which Linux has")
def test_the_setting_is_taken_or_declined_without_an_error():
    import platform

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_the_peak_grows_with_what_is_held():
    before = peak_memory_mib()
    block = np.ones(200 * 2**17)  # 200 MiB
    after = peak_memory_mib()
    assert block.sum() == block.size
    assert before is not None
    assert after is not None
    assert after >= before
    assert after >= 200
