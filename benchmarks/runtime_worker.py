"""Runs exported files on whichever ONNX Runtime release the path has first; one line of JSON a file.

``runtime_matrix.py`` starts it once a release: two releases cannot share a process, and an old one may crash.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from metaaug_cli.deployment.manifest import read_manifest
from metaaug_cli.deployment.ort import count_kernels, open_session
from metaaug_cli.errors import InputError

KINDS = ("Conv", "Gemm", "Add")
# Wrong results of 4- and 2-bit types came and went with the batch size.
BATCHES = (1, 2, 8, 64, 200, 600)


def check(path: Path, images: np.ndarray, out: Path) -> dict[str, Any]:
    """Load a file without and with the session options it declares, and count its integer kernels."""
    manifest = read_manifest(onnx.load(path))
    options = manifest.packing.session_options if manifest else {}
    result: dict[str, Any] = {"file": path.name, "options": options, "loads": False, "loads_plain": False}
    try:
        open_session(path, threads=1)
        result["loads_plain"] = True
    except InputError as error:
        result["refused"] = error.message.partition(": ")[2]
    try:
        session = open_session(path, threads=1, options=options, reuse_memory=True)
        kernels = count_kernels(path, options=options)
        logits = np.stack([_in_batches(session, images, size) for size in BATCHES])
    except InputError as error:
        return result | {"refused": error.message.partition(": ")[2]}
    except Exception as error:  # a kernel that is missing only shows when it runs
        return result | {"refused": str(error).splitlines()[0][:400]}
    np.save(out / f"{path.stem}.npy", logits)
    integer, nodes = kernels.of(*KINDS)
    return result | {"loads": True, "integer": integer, "nodes": nodes}


def _in_batches(session: onnxruntime.InferenceSession, images: np.ndarray, size: int) -> np.ndarray:
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return np.concatenate([session.run(None, {"input": part})[0] for part in parts])


def main() -> None:
    """Check every file of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--release", required=True)
    arguments = parser.parse_args()
    if onnxruntime.__version__ != arguments.release:
        raise SystemExit(f"onnxruntime {onnxruntime.__version__} is loaded, not {arguments.release}")
    images = np.load(arguments.images)
    for path in arguments.files:
        print(json.dumps(check(path, images, arguments.out)), flush=True)


if __name__ == "__main__":
    main()
