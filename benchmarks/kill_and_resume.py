"""Kill a run with SIGKILL at random moments, resume it, and compare with an undisturbed run byte for byte.

``python benchmarks/kill_and_resume.py [--kills 5] [--seed 0]`` appends to
benchmarks/results/kill_and_resume.jsonl and exits with 1 where an artefact differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
from common import SHARED, record

_COMMAND = [
    sys.executable,
    "-m",
    "metaaug_cli",
    "quantize",
    f"{SHARED}/models/cifar_resnet.py:resnet20",
    "--weights",
    f"{SHARED}/models/cifar_resnet20.safetensors",
    "--calib",
    f"{SHARED}/data/cifar10/calib",
    "--mean=.4914,.4822,.4465",
    "--std=.2470,.2435,.2616",
    *[
        "--augment",
        "none",
        "--size",
        "32",
        "--wbits",
        "2",
        "--abits",
        "4",
        "--num",
        "64",
        "--iterations",
        "60",
        "--device",
        "cpu",
        "--quiet",
    ],
]


def digest(run: Path) -> dict[str, str]:
    """Hashes of what a run produced: every block's state and the exported network."""
    path = run / "model.onnx"
    export = [sys.executable, "-m", "metaaug_cli", "export", str(run), "-o", str(path), "--quiet"]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    content = {file.name: file.read_bytes() for file in sorted((run / "blocks").glob("*.safetensors"))}
    # The file's metadata holds the run's own seconds and peak memory; the network must not differ.
    content["model.onnx"] = onnx.load(path).graph.SerializeToString(deterministic=True)
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def killed_run(run: Path, after: float) -> int:
    """Start a run, kill it after some seconds, resume it; returns how many blocks had survived."""
    process = subprocess.Popen([*_COMMAND, "--out", str(run)], stdout=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    survived = len(list((run / "blocks").glob("*.json")))
    resume = ["--resume"] if (run / "run.json").exists() else []
    subprocess.run([*_COMMAND, "--out", str(run), *resume], check=True, stdout=subprocess.DEVNULL)
    return survived


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        subprocess.run([*_COMMAND, "--out", f"{folder}/whole"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        expected = digest(Path(folder) / "whole")
        for number in range(arguments.kills):
            after = draw.uniform(0.15, 0.95) * seconds
            survived = killed_run(Path(folder) / f"killed{number}", after)
            found = digest(Path(folder) / f"killed{number}")
            identical = found == expected
            different += not identical
            values = {
                "after_seconds": round(after, 1),
                "of_seconds": round(seconds, 1),
                "blocks_kept": survived,
                "identical": identical,
            }
            record("kill_and_resume", {"kill": number, "seed": arguments.seed}, values)
            print(values, sorted(name for name in expected if found.get(name) != expected[name]), flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
