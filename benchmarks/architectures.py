"""W8A8 on 16 torchvision architectures with random weights: plan, quantize, export, run in ONNX Runtime.

``python benchmarks/architectures.py [NAME ...]`` appends to benchmarks/results/architectures.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import record
from torch import nn

from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.deployment.ort import count_kernels, open_session
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import MetaAugError
from metaaug_cli.networks.models import load_model
from metaaug_cli.pipeline import quantize
from metaaug_cli.planning import plan_run
from metaaug_cli.prepare import prepare_chain, schedule_of
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.verification.evaluation import onnx_predictor
from metaaug_cli.verification.parity import check_parity

NAMES = [
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "densenet121",
    "squeezenet1_1",
    "mnasnet0_5",
    "vgg11_bn",
    "convnext_tiny",
    "vit_b_16",
    "googlenet",
    "inception_v3",
    "swin_t",
]


def run(name: str, bits: int, images: int) -> dict[str, Any]:
    """One architecture, end to end; an error we raise on purpose is a result."""
    torch.manual_seed(0)
    started = time.monotonic()
    model = load_model(name, weights="random")
    assert isinstance(model.module, nn.Module)
    height, width = model.preprocessing.size
    data = torch.rand(images, 3, height, width).sub_(0.45).div_(0.225)
    calibration = CalibrationSet(
        data, model.preprocessing, ("random",) * images, (), "0" * 64, "random pixels"
    )
    settings = [
        f"quantization.weight_bits={bits}",
        f"quantization.act_bits={bits}",
        "reconstruction.method=nearest",
    ]
    recipe = Recipe().override(settings)
    try:
        chain = prepare_chain(model.module, tuple(data.shape[1:]), recipe)
        blocks = plan_run(chain, schedule_of(recipe), images=images, device=torch.device("cpu"))
        result = quantize(model, calibration, recipe=recipe, device="cpu")
        simulation = IntegerSimulation(result.deployed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            manifest = Manifest(model=name, placement="integer", method="nearest")
            exported = export_onnx(
                result.deployed, input_size=result.input_size, path=path, manifest=manifest
            )
            kernels = count_kernels(path)
            logits = onnx_predictor(open_session(path))(data)
            parity = check_parity(path, simulation, [data])
        with torch.no_grad():
            simulated, full = simulation(data), result.float_module(data)
    except MetaAugError as error:
        return {"ok": False, "error": error.message, "seconds": round(time.monotonic() - started, 1)}
    integer, total = kernels.of(
        "Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"
    )
    return {
        "ok": True,
        "blocks": len(blocks),
        "integer_nodes": integer,
        "nodes": total,
        "floating": dict(kernels.floating),
        "float_mb": round(exported.float_bytes / 1e6, 1),
        "file_mb": round(exported.size_bytes / 1e6, 1),
        "agreement": float((logits.argmax(1) == simulated.argmax(1)).float().mean()),
        "max_logit_difference": float((logits - simulated).abs().max()),
        "error_to_float": float((simulated - full).norm() / full.norm()),
        "parity": parity.verdict(),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Run the named architectures, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=8)
    arguments = parser.parse_args()
    for name in arguments.names:
        values = run(name, arguments.bits, arguments.images)
        record("architectures", {"model": name, "bits": arguments.bits, "images": arguments.images}, values)
        print(name, values, flush=True)


if __name__ == "__main__":
    main()
