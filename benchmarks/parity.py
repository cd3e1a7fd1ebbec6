"""Both parity gates on every test image, and file sizes per packing: ``python benchmarks/parity.py``.

Appends to benchmarks/results/parity.jsonl; finished keys are not repeated. Exits with 1 where a gate fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Subject, bit_settings, is_recorded, mobilenet, quantized, record, resnet20

from metaaug_cli.deployment.export import ExportResult, export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.deployment.ort import count_kernels
from metaaug_cli.deployment.packing import PackMode
from metaaug_cli.verification.parity import check_parity

_PACKS: tuple[PackMode, ...] = ("int8", "packed", "native")
_SUBJECTS = {"resnet20": (resnet20, "genie", 100), "mobilenet": (mobilenet, "nearest", 1)}
_BITS = ("w8a8", "w4a4", "w2a4", "w2a2")


def measure(subject: Subject, bits: str, method: str, iterations: int) -> dict[str, Any]:
    """Quantize, export every packing, and compare all codes of the default one."""
    settings = [
        *bit_settings(bits),
        f"reconstruction.method={method}",
        f"reconstruction.iterations={iterations}",
        "augmentation.kind=none",
    ]
    result = quantized(subject, settings, num=128, seed=0)
    manifest = Manifest(model=subject.name, placement="integer", method=method)
    exported: dict[PackMode, ExportResult] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pack in _PACKS:
            path = Path(folder) / f"{pack}.onnx"
            exported[pack] = export_onnx(
                result.deployed, input_size=result.input_size, path=path, manifest=manifest, pack=pack
            )
        path = Path(folder) / "int8.onnx"
        started = time.monotonic()
        parity = check_parity(path, result.deployed, subject.images.split(32), reference=True)
        integer, total = count_kernels(path).of("Conv", "Gemm", "Add")
    codes = sum(layer.codes for layer in parity.layers)
    return {
        "images": parity.images,
        "codes": codes,
        "reference_mismatches": sum(x.reference.mismatches for x in parity.layers if x.reference),
        "forced_mismatches": sum(x.forced.mismatches for x in parity.layers),
        "free_mismatches": sum(x.free.mismatches for x in parity.layers),
        "top1_agreement": parity.top1_agreement,
        "max_logit_difference": parity.max_logit_difference,
        "passed": parity.passed,
        "verdict": parity.verdict(),
        "integer_nodes": integer,
        "nodes": total,
        "float_bytes": exported["int8"].float_bytes,
        "bytes": {pack: file.size_bytes for pack, file in exported.items()},
        "parity_seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Measure every network and width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["resnet20", "mobilenet"])
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    failed = 0
    for name in arguments.networks:
        load, method, iterations = _SUBJECTS[name]
        subject = load()
        for bits in _BITS:
            key = {"model": subject.name, "bits": bits, "method": method, "iterations": iterations}
            if is_recorded("parity", key):
                continue
            values = measure(subject, bits, method, iterations)
            failed += not values["passed"]
            record("parity", key, values)
            print(key, values, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
