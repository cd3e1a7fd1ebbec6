"""What a run measures of itself: the content of ``metrics.json``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.memory import peak_gpu_memory_mib, peak_memory_mib
from metaaug_cli.quantization.blocks import Chain
from metaaug_cli.quantization.reconstruct import BlockHistory

_AGREEMENT_IMAGES, _AGREEMENT_BATCH = 128, 32


def top1(logits: Any) -> Any:
    """The class of each row of logits, a tensor or an array; a single logit decides at 0."""
    return logits.argmax(-1) if logits.shape[-1] > 1 else logits[..., 0] > 0


@torch.no_grad()
def run_metrics(
    chain: Chain,
    histories: list[BlockHistory],
    images: Tensor,
    deployed: fx.GraphModule,
    seconds: float,
) -> dict[str, Any]:
    """What a run measured of itself.

    Args:
        chain: On the CPU.
        histories: Of its blocks, in order.
        images: (N, C, H, W) it was fitted on; the agreement with float is on up to 128 of them.
        deployed: From ``deploy``.
        seconds: That learning took.
    """
    shown, simulation = images[:_AGREEMENT_IMAGES], IntegerSimulation(deployed)
    same = [
        (top1(chain.module(part)) == top1(simulation(part))).float() for part in shown.split(_AGREEMENT_BATCH)
    ]
    return {
        "calibration_agreement": float(torch.cat(same).mean()),
        "calibration_agreement_images": len(shown),
        "seconds": round(seconds, 1),
        "peak_memory_mib": peak_memory_mib(),
        "peak_gpu_memory_mib": peak_gpu_memory_mib(),
        "blocks": {
            block.name: {
                "loss_before": h.loss_before,
                "loss_after": h.loss_after,
                "seconds": round(h.seconds, 2),
                "losses": h.losses,
                "augmentation": h.augmentation,
            }
            for block, h in zip(chain.blocks, histories, strict=True)
        },
    }
