"""What the benchmarks share: the data they measure on, one measured run, and an append-only record.

The inputs are ImageNet and CIFAR-10 folders that cannot be shipped; METAAUG_SHARED names the directory
that holds them (default: ``../shared`` beside the checkout).
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaaug_cli.calibration.data import (
    check_class_count,
    iter_labelled_batches,
    load_calibration_set,
    scan_folder,
)
from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.deployment.ort import count_kernels, open_session
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.memory import keep_freed_memory
from metaaug_cli.networks.models import LoadedModel, load_model
from metaaug_cli.pipeline import QuantizedModel, quantize
from metaaug_cli.quantization.blocks import Block
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.verification.evaluation import onnx_predictor, predict, score, torch_predictor

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("METAAUG_SHARED", ROOT.parent / "shared"))
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Subject:
    """A trained network with its calibration and evaluation images."""

    name: str
    model: LoadedModel
    calib: Path
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Network:
    """A network of ``SHARED`` and the images it is trained for.

    Args:
        name: In results.
        factory: ``FILE.py:FACTORY`` below ``models``; ``weights`` lies beside it.
        data: Folder below ``data``, with calibration images in ``calib`` and class names in ``classes.txt``.
        test: Folder of evaluation images beside ``calib``.
    """

    name: str
    factory: str
    weights: str
    data: str
    test: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self, weights: str | None = None) -> LoadedModel:
        """The trained network, or one with other ``weights``, such as "random"."""
        return load_model(
            f"{SHARED}/models/{self.factory}",
            weights=weights or SHARED / "models" / self.weights,
            size=self.size,
            mean=self.mean,
            std=self.std,
        )

    def subject(self) -> Subject:
        """The trained network with its images."""
        model, folder = self.load(), SHARED / "data" / self.data
        classes = folder / "classes.txt"
        found = scan_folder(folder / self.test, classes_file=classes)
        check_class_count(found, len(classes.read_text(encoding="utf-8").split()))
        images, labels = zip(*iter_labelled_batches(found, model.preprocessing), strict=True)
        known = torch.cat([y for y in labels if y is not None])
        return Subject(self.name, model, folder / "calib", torch.cat(images), known)


RESNET20 = Network(
    "resnet20", "cifar_resnet.py:resnet20", "cifar_resnet20.safetensors", "cifar10", "test",
    32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
)  # fmt: skip
MOBILENET = Network(
    "mobilenet_v1_075", "mobilenet_v1.py:mobilenet_v1_075", "mobilenet_v1_075.safetensors", "imagenet", "val",
    224, (0.5,) * 3, (0.5,) * 3,
)  # fmt: skip


MOBILENET_128 = replace(MOBILENET, name="mobilenet_v1_075 at 128 px", size=128)


def resnet20() -> Subject:
    """ResNet-20 on CIFAR-10: 5 000 test images."""
    return RESNET20.subject()


def mobilenet() -> Subject:
    """MobileNet-V1 0.75 on ImageNet: 650 validation images."""
    return MOBILENET.subject()


def mobilenet_128() -> Subject:
    """The same on images resized to 128 px, a third of the work: float top-1 61.85."""
    return MOBILENET_128.subject()


def quantized(
    subject: Subject,
    settings: Iterable[str],
    *,
    num: int,
    seed: int,
    base: Recipe | None = None,
    run_dir: Path | None = None,
) -> QuantizedModel:
    """Quantize with recipe settings written ``section.key=value``, on top of the defaults or of ``base``.

    Without ``base`` the first layer's output has ``act_bits`` and learning starts from the nearest codes, as
    when the older records were made.
    """
    keep_freed_memory()
    older = ["quantization.stem_output_bits=same", "reconstruction.start=nearest"]
    start = base or Recipe().override(older)
    recipe = start.override([f"seed={seed}", f"calibration.num={num}", *settings])
    calibration = load_calibration_set(
        subject.calib, preprocessing=subject.model.preprocessing, num=num, seed=seed
    )
    return quantize(subject.model, calibration, recipe=recipe, run_dir=run_dir)


def bit_settings(bits: str) -> list[str]:
    """The two settings that "w4a4" and the like stand for."""
    return [f"quantization.weight_bits={bits[1]}", f"quantization.act_bits={bits[3]}"]


def onnx_scores(subject: Subject, result: QuantizedModel) -> dict[str, float]:
    """The exported file in ONNX Runtime against labels and float network.

    Returns:
        ``onnxruntime`` (top-1) and ``agreement``, in percent, and ``divergence``, the mean KL divergence of
        the float network's predictions from the file's, which few images tell more exactly than either.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        manifest = Manifest(model=subject.name, placement=result.chain.placement.kind, method="benchmark")  # type: ignore[arg-type]
        export_onnx(result.deployed, input_size=result.input_size, path=path, manifest=manifest)
        batches = zip(subject.images.split(50), subject.labels.split(50), strict=True)
        predictors = {
            "float": torch_predictor(result.float_module),
            "onnxruntime": onnx_predictor(open_session(path)),
        }
        predictions = predict(predictors, batches)
    runtime = score(predictions).scores["onnxruntime"]
    found, wanted = (predictions.logits[name].log_softmax(-1) for name in ("onnxruntime", "float"))
    return {
        "onnxruntime": percent(runtime.top1),
        "agreement": percent(runtime.agreement["float"]),
        "divergence": round(float(F.kl_div(found, wanted, reduction="batchmean", log_target=True)), 4),
    }


def measure(
    subject: Subject,
    settings: list[str],
    *,
    num: int,
    seed: int,
    base: Recipe | None = None,
    simulate: bool = True,
) -> dict[str, Any]:
    """Quantize, export, evaluate float, the slow simulation and ONNX Runtime on the same images."""
    started = time.monotonic()
    result = quantized(subject, settings, num=num, seed=seed, base=base)
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        manifest = Manifest(model=subject.name, placement=result.chain.placement.kind, method="benchmark")  # type: ignore[arg-type]
        export_onnx(result.deployed, input_size=result.input_size, path=path, manifest=manifest)
        predictors = {
            "float": torch_predictor(result.float_module),
            "onnxruntime": onnx_predictor(open_session(path)),
        }
        if simulate:
            predictors["simulated"] = torch_predictor(IntegerSimulation(result.deployed))
        batches = zip(subject.images.split(50), subject.labels.split(50), strict=True)
        evaluation = score(predict(predictors, batches))
        kernels = count_kernels(path)
        integer, total = kernels.of("Conv", "Gemm", "Add")
        size = path.stat().st_size
    scores = evaluation.scores
    runtime = scores["onnxruntime"]
    agreements = {f"agreement_{name}": round(100 * share, 2) for name, share in runtime.agreement.items()}
    return {
        **{name: percent(s.top1) for name, s in scores.items()},
        **agreements,
        "integer_nodes": integer,
        "nodes": total,
        "file_bytes": size,
        "images": len(subject.labels),
        "seconds": round(seconds, 1),
        "peak_memory_mib": result.metrics["peak_memory_mib"],
        "seconds_per_block": {name: b["seconds"] for name, b in result.metrics["blocks"].items()},
    }


@contextmanager
def plain_operators(blocks: list[Block]) -> Iterator[None]:
    """Quantizers as their formulas in PyTorch operators."""
    quantizers = [q for block in blocks for q in block.activations.values()]
    for quantizer in quantizers:
        quantizer.twice_differentiable = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.twice_differentiable = False


def percent(share: float | None) -> float:
    """A share of labelled images in percent."""
    if share is None:
        raise ValueError("the images have no labels")
    return round(100 * share, 2)


def recorded(name: str) -> list[dict[str, Any]]:
    """All records of one benchmark so far."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(name: str, key: dict[str, Any], values: dict[str, Any]) -> None:
    """Append one record with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    line = {**key, **values, "machine": machine()}
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def is_recorded(name: str, key: dict[str, Any]) -> bool:
    """Whether a record with exactly this key is there, so that a benchmark can be continued."""
    return any(all(r.get(k) == v for k, v in key.items()) for r in recorded(name))


def machine(*, uses_gpu: bool = True) -> str:
    """Processor, or the GPU where there is one and it is used, threads and torch version, in a few words."""
    from metaaug_cli.runs.environment import environment

    found = environment()
    computes = found["gpu"] if uses_gpu and "gpu" in found else found["processor"]
    return f"{computes}, {found['threads']} threads, torch {torch.__version__}, {platform.system()}"
