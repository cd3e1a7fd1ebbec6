"""What learning takes on a GPU: ``python benchmarks/gpu_cost.py``.

A network of ResNet-18's shape (random weights, random images of 224 px: neither changes the time) is
quantized with MetaAug for a few outer steps and iterations, and what they take is given for 1 000
iterations of all blocks and for one outer step. Appends to benchmarks/results/gpu_cost.jsonl; wants an
otherwise idle GPU.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from common import is_recorded, record

from metaaug_cli.calibration.data import make_calibration_set
from metaaug_cli.networks.models import load_model
from metaaug_cli.pipeline import quantize
from metaaug_cli.recipe.config import Recipe

_IMAGES = 256
_ITERATIONS, _STEPS = 400, 8
_FORMS = {"residual, base width 64": ("residual", 64), "policy": ("policy", 16)}


def measure(form: str, batch: int) -> dict[str, Any]:
    """One short run."""
    model = load_model("resnet18", weights="random")
    size = (_IMAGES, 3, *model.preprocessing.size)
    pictures = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    calibration = make_calibration_set(pictures, model.preprocessing, [str(i) for i in range(_IMAGES)])
    kind, width = _FORMS[form]
    recipe = Recipe().override(
        [
            *("quantization.weight_bits=2", "quantization.act_bits=4", "augmentation.kind=metaaug"),
            *(f"metaaug.form={kind}", f"metaaug.base_width={width}", f"metaaug.steps={_STEPS}"),
            *(f"metaaug.batch_size={batch}", f"metaaug.val_batch_size={batch}", "augmentation.copies=1"),
            *(f"reconstruction.iterations={_ITERATIONS}", f"reconstruction.batch_size={batch}"),
        ]
    )
    torch.cuda.reset_peak_memory_stats()
    result = quantize(model, calibration, recipe=recipe, device="cuda")
    taught = [h.augmentation["seconds"] for h in result.histories if h.augmentation]
    return {
        "blocks": len(result.histories),
        "seconds_per_1000_iterations": round(
            mean(h.seconds for h in result.histories) * 1000 / _ITERATIONS, 2
        ),
        "seconds_per_outer_step": round(mean(taught) / _STEPS, 4),
        "slowest_outer_step": round(max(taught) / _STEPS, 4),
        "peak_gpu_memory_mib": result.metrics["peak_gpu_memory_mib"],
    }


def main() -> None:
    """Measure what is not recorded yet."""
    for form in _FORMS:
        for batch in (32, 64):
            key = {"network": "resnet18 shape, 224 px", "augmenter": form, "batch": batch}
            if is_recorded("gpu_cost", key):
                continue
            values = measure(form, batch)
            record("gpu_cost", key, values)
            print(key, values, flush=True)


if __name__ == "__main__":
    main()
