"""What learning takes on a GPU: ``python benchmarks/gpu_cost.py``.

A network of ResNet-18's shape at 224 px (random weights and images: neither changes the time), every block
as ``--plan`` times it: seconds for 1 000 iterations of all blocks and for one outer step, with the steps
recorded as CUDA graphs and as they are. Appends to benchmarks/results/gpu_cost.jsonl; wants an otherwise
idle GPU.
"""

from __future__ import annotations

from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from common import is_recorded, record

from metaaug_cli.networks.models import load_model
from metaaug_cli.planning import TeachingPlan, plan_run
from metaaug_cli.prepare import augmenter_of, meta_schedule_of, prepare_chain, schedule_of
from metaaug_cli.quantization.graphed import GraphedStep
from metaaug_cli.recipe.config import Recipe

_CASES = [("residual", 32, True), ("residual", 32, False), ("residual", 64, True), ("policy", 32, True)]
_WIDTHS = {"residual": 64, "policy": 16}


def measure(form: str, batch: int) -> dict[str, Any]:
    """Time every block."""
    model = load_model("resnet18", weights="random")
    recipe = Recipe().override(
        [
            *("quantization.weight_bits=2", "quantization.act_bits=4", "augmentation.kind=metaaug"),
            *(f"metaaug.form={form}", f"metaaug.base_width={_WIDTHS[form]}", f"metaaug.batch_size={batch}"),
            *(f"metaaug.val_batch_size={batch}", f"reconstruction.batch_size={batch}"),
        ]
    )
    schedule, outer = schedule_of(recipe), meta_schedule_of(recipe)
    chain = prepare_chain(model.module, (3, *model.preprocessing.size), recipe)
    torch.cuda.reset_peak_memory_stats()
    rows = plan_run(
        chain,
        schedule,
        images=1024,
        device=torch.device("cuda"),
        teaching=TeachingPlan(augmenter_of(recipe), outer, model.preprocessing),
    )
    learned = [r.seconds for r in rows if r.seconds is not None]
    taught = [r.augmenter_seconds / outer.steps for r in rows if r.augmenter_seconds is not None]
    return {
        "blocks": len(rows),
        "seconds_per_1000_iterations": round(sum(learned) * 1000 / schedule.iterations, 1),
        "seconds_per_outer_step": round(mean(taught), 4),
        "slowest_outer_step": round(max(taught), 4),
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20,
        "cache_mib": sum(r.cache_bytes for r in rows) // 2**20,
        "largest_cache_mib": max(r.cache_bytes for r in rows) // 2**20,
    }


def main() -> None:
    """Measure what is not recorded yet."""
    for form, batch, replayed in _CASES:
        key = {"network": "resnet18 shape, 224 px", "augmenter": form, "batch": batch, "replayed": replayed}
        if is_recorded("gpu_cost", key):
            continue
        if replayed:
            values = measure(form, batch)
        else:
            with patch.object(GraphedStep, "__call__", lambda self, inputs: self.step(inputs)):
                values = measure(form, batch)
        record("gpu_cost", key, values)
        print(key, values, flush=True)


if __name__ == "__main__":
    main()
