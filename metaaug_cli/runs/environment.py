"""What a run was made with: versions and machine."""

import platform
import re
from pathlib import Path

import torch

from metaaug_cli.deployment.manifest import package_versions


def environment() -> dict[str, str]:
    """Versions and machine, for the record."""
    found = {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | package_versions()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.processor()
