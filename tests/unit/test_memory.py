"""The allocator setting and the peak it is judged by."""

import sys

import numpy as np
import pytest

from metaaug_cli.memory import free_memory_bytes, keep_freed_memory, peak_memory_mib


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


def machine(folder, files):
    for name, text in {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB\n", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def group(path, limit, used, cached, *, version):
    names = {
        1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        2: ("max", "current", "inactive_file"),
    }[version]
    return {
        f"{path}/memory.{names[0]}": f"{limit}\n",
        f"{path}/memory.{names[1]}": f"{used}\n",
        f"{path}/memory.stat": f"anon 5\n{names[2]} {cached}\n",
    }


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
SELF_V1, SELF_V2 = "9:pids:/a\n4:cpu,memory:/a/b\n0::/\n", "0::/a/b\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 800 * 1024),
        ({"proc/self/cgroup": SELF_V2, **group(f"{V2}/a/b", 500_000, 400_000, 1_000, version=2)}, 101_000),
        ({"proc/self/cgroup": SELF_V2, **group(f"{V2}/a", 500_000, 400_000, 0, version=2)}, 100_000),
        ({"proc/self/cgroup": SELF_V2, **group(f"{V2}/a/b", "max", 400_000, 0, version=2)}, 800 * 1024),
        ({"proc/self/cgroup": SELF_V2, **group(f"{V2}/c", 10, 5, 0, version=2)}, 800 * 1024),
        ({"proc/self/cgroup": SELF_V1, **group(f"{V1}/a/b", 700_000, 500_000, 50, version=1)}, 200_050),
        ({"proc/self/cgroup": SELF_V1, **group(V1, 300_000, 100_000, 0, version=1)}, 200_000),
        ({"proc/self/cgroup": SELF_V1, **group(V1, 2**63 - 4096, 100_000, 0, version=1)}, 800 * 1024),
        ({"proc/self/cgroup": SELF_V2, **group(V2, 100, 300, 0, version=2)}, 0),
    ],
)
def test_a_container_leaves_what_is_below_its_limit(tmp_path, files, free):
    assert free_memory_bytes(machine(tmp_path, files)) == free


def test_free_memory_is_guessed_where_nobody_says(tmp_path):
    assert free_memory_bytes(tmp_path) == 8 << 30
    assert free_memory_bytes() > 0
