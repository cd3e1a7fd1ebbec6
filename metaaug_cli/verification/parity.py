"""Do the simulation and ONNX Runtime compute the same codes?

Three comparisons at every activation quantizer of an exported file, on the same images:

- free running: the simulation against the runtime, differences passing from layer to layer;
- teacher forced (gate B): each layer of the simulation reads the runtime's codes, so a difference is its own;
- reference (gate A): the integer executor of ``reference`` against the runtime, which must agree exactly
  but for codes behind float operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx

from metaaug_cli.deployment.onnx_view import CodeTensor
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import InputError
from metaaug_cli.runs.measured import top1
from metaaug_cli.verification.codes import Comparison, RuntimeCodes, Worst, compare_codes, simulate
from metaaug_cli.verification.reference import IntegerExecutor

__all__ = ["Comparison", "LayerParity", "Parity", "Worst", "check_parity"]

MAX_FORCED_FRACTION = 2e-4
MAX_FORCED_STEPS = 1
MIN_TOP1_AGREEMENT = 0.995
_FEW_CODES = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerParity:
    """Codes of one activation quantizer, compared with ONNX Runtime's.

    Args:
        name: Name of the quantizer.
        codes: Number of codes compared.
        free: Simulation, free running.
        forced: Simulation, teacher forced.
        reference: Integer reference; None where it was not run.
        exact: Whether the codes come from an integer kernel; behind a float operator ties break either way.
    """

    name: str
    codes: int
    free: Comparison
    forced: Comparison
    reference: Comparison | None = None
    exact: bool = True

    @property
    def simulation_agrees(self) -> bool:
        """Gate B for this layer."""
        return self._tolerable(self.forced)

    @property
    def reference_agrees(self) -> bool:
        """Gate A for this layer: no code differs; behind a float operator the tolerance of gate B."""
        if self.reference is None or self.reference.mismatches == 0:
            return True
        return not self.exact and self._tolerable(self.reference)

    def _tolerable(self, found: Comparison) -> bool:
        """Few differences of one step. Three may differ however small the tensor is."""
        allowed = max(MAX_FORCED_FRACTION * self.codes, _FEW_CODES)
        return found.mismatches <= allowed and found.max_steps <= MAX_FORCED_STEPS


@dataclass(frozen=True)
class Parity:
    """The comparison of a simulation with an exported file.

    Args:
        images: Number of images.
        layers: One entry per activation quantizer, in execution order.
        max_logit_difference: Largest absolute difference of a logit, free running.
        logit_std: Standard deviation of the runtime's logits.
        top1_agreement: Fraction of images with the same top-1 class, free running.
        reference_top1_agreement: The same for the integer reference; None where it was not run.
        disturbance: Largest change of a logit when the runtime's codes are read.
    """

    images: int
    layers: tuple[LayerParity, ...]
    max_logit_difference: float
    logit_std: float
    top1_agreement: float
    reference_top1_agreement: float | None = None
    disturbance: float = 0.0

    @property
    def all_integer(self) -> bool:
        """Whether every code comes from an integer kernel."""
        return all(layer.exact for layer in self.layers)

    @property
    def undisturbed(self) -> bool:
        """Whether the codes that were read are those of an ordinary run.

        Reading a tensor keeps it from being optimised away. Integer kernels give the same codes all the
        same; float operators may round differently, which the tolerances allow for.
        """
        return self.disturbance == 0.0 or not self.all_integer

    @property
    def first_inexact(self) -> LayerParity | None:
        """First layer where the integer reference and the runtime differ (gate A)."""
        return next((layer for layer in self.layers if not layer.reference_agrees), None)

    @property
    def first_out_of_tolerance(self) -> LayerParity | None:
        """First layer whose teacher-forced codes leave the tolerance (gate B)."""
        return next((layer for layer in self.layers if not layer.simulation_agrees), None)

    @property
    def gate_a(self) -> bool:
        """The integer reference, where it was run, agrees; in top-1 classes too without float operators."""
        same_classes = self.reference_top1_agreement in (None, 1.0) or not self.all_integer
        return self.first_inexact is None and same_classes

    @property
    def gate_b(self) -> bool:
        """The simulation agrees with the runtime within tolerance."""
        return self.first_out_of_tolerance is None and self.top1_agreement >= MIN_TOP1_AGREEMENT

    @property
    def passed(self) -> bool:
        """Both gates."""
        return self.gate_a and self.gate_b and self.undisturbed

    def verdict(self) -> str:
        """One sentence: passed, or the first layer out of tolerance and its worst case."""
        if not self.undisturbed:
            return "ONNX Runtime gives other logits when its codes are read, so they cannot be compared"
        for layer, other in ((self.first_inexact, "reference"), (self.first_out_of_tolerance, "simulation")):
            if layer is not None:
                found = layer.reference if other == "reference" else layer.forced
                assert found is not None  # a layer without a reference cannot differ from it
                count = f"{found.mismatches} of {layer.codes} codes differ"
                return f"{layer.name}: {count} from the {other}; {found.worst}"
        if not self.passed:
            return (
                f"every layer is within tolerance, but top-1 agreement is {100 * self.top1_agreement:.2f} %"
            )
        return f"all {len(self.layers)} code tensors agree"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports, with the verdicts."""
        verdicts = {"gate_a": self.gate_a, "gate_b": self.gate_b, "passed": self.passed}
        return {**asdict(self), **verdicts, "verdict": self.verdict()}


def check_parity(
    path: Path | str,
    module: fx.GraphModule | IntegerSimulation,
    batches: Iterable[Tensor],
    *,
    reference: bool = False,
    chunk: int = 16,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Compare a deployed module, and optionally the integer reference, with ONNX Runtime.

    Args:
        path: File exported from the module.
        module: The module, or its simulation, on the CPU.
        batches: Normalised images (N, C, H, W).
        reference: Also run the integer reference (gate A).
        chunk: Images at a time, unless the file asks for another number; all codes of a chunk are held in
            memory.
        threads: ONNX Runtime's threads.
        progress: Called with (images done, 0) after every chunk; the total is not known.

    Raises:
        InputError: The file cannot be read, there are no images or some of another shape, or the file is
            not an export of the module.
    """
    runtime = RuntimeCodes(Path(path), threads=threads)
    executor = IntegerExecutor(runtime.model) if reference else None
    deployed = module.deployed if isinstance(module, IntegerSimulation) else module
    tally = _Tally(runtime.tensors)
    for images in _chunks(batches, runtime.batch or chunk):
        tally.add(images, runtime, deployed, executor)
        if progress is not None:
            progress(tally.images, 0)
    return tally.result(disturbance=runtime.disturbance)


def _chunks(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.float().split(size)


class _Tally:
    """Sums comparisons over chunks of images."""

    def __init__(self, tensors: tuple[CodeTensor, ...]) -> None:
        self.images = 0
        self._tensors = tensors
        self._codes = dict.fromkeys((t.name for t in tensors), 0)
        self._free = dict.fromkeys(self._codes, Comparison())
        self._forced = dict.fromkeys(self._codes, Comparison())
        self._reference: dict[str, Comparison] = {}
        self._agree = {"simulation": 0, "reference": 0}
        self._logits: list[np.ndarray] = []
        self._largest = 0.0

    def add(
        self,
        images: Tensor,
        runtime: RuntimeCodes,
        deployed: fx.GraphModule,
        executor: IntegerExecutor | None,
    ) -> None:
        logits, codes = runtime.run(images.numpy())
        simulated, free = simulate(deployed, images, codes, force=False)
        # Without a difference every layer read the runtime's codes already.
        differs = any(found.mismatches for found in free.values())
        _, forced = simulate(deployed, images, codes, force=True) if differs else (simulated, free)
        for name, values in codes.items():
            self._codes[name] += values.size
            self._free[name] = self._free[name].plus(free[name].shifted(self.images))
            self._forced[name] = self._forced[name].plus(forced[name].shifted(self.images))
        if executor is not None:
            resumed = {t.name: codes[t.name] for t in self._tensors if not t.exact}
            exact_logits, exact = executor.run(images.numpy(), forced=resumed)
            for name, values in codes.items():
                found = compare_codes(exact[name], values).shifted(self.images)
                self._reference[name] = self._reference.get(name, Comparison()).plus(found)
            self._agree["reference"] += int((top1(exact_logits) == top1(logits)).sum())
        self._agree["simulation"] += int((top1(simulated) == top1(logits)).sum())
        self._largest = max(self._largest, float(np.abs(simulated - logits).max(initial=0)))
        self._logits.append(logits)
        self.images += len(images)

    def result(self, *, disturbance: float) -> Parity:
        if not self.images:
            raise InputError("there are no images to check parity on", hint="give a folder with images")
        layers = tuple(
            LayerParity(
                name=t.name,
                codes=self._codes[t.name],
                free=self._free[t.name],
                forced=self._forced[t.name],
                reference=self._reference.get(t.name),
                exact=t.exact,
            )
            for t in self._tensors
        )
        return Parity(
            images=self.images,
            layers=layers,
            max_logit_difference=self._largest,
            logit_std=float(np.concatenate(self._logits).std()),
            top1_agreement=self._agree["simulation"] / self.images,
            reference_top1_agreement=self._agree["reference"] / self.images if self._reference else None,
            disturbance=disturbance,
        )
