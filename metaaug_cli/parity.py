"""Do the simulation and ONNX Runtime compute the same codes?

Three comparisons at every activation quantizer of an exported file, on the same images:

- free running: the simulation against the runtime, differences passing from layer to layer;
- teacher forced: each layer of the simulation reads the runtime's codes, so a difference is the layer's own;
- reference: the integer executor of ``reference`` against the runtime, which must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaaug_cli.errors import InputError
from metaaug_cli.onnx_view import CodeTensor, code_tensors
from metaaug_cli.ort import open_session
from metaaug_cli.qdq_ops import dequantize_codes, quantize_codes

MAX_FORCED_FRACTION = 2e-4
MAX_FORCED_STEPS = 1
MIN_TOP1_AGREEMENT = 0.995
_FEW_CODES = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Worst:
    """One differing code: where it is and both values.

    Args:
        index: Image number in the run, then position in the tensor.
        ours: Code of the simulation or reference.
        runtime: Code of ONNX Runtime.
        value: The simulation's value in steps of the quantizer before rounding, zero point included; None
            for the reference, which has no such number.
    """

    index: tuple[int, ...]
    ours: int
    runtime: int
    value: float | None = None

    def __str__(self) -> str:
        before = "" if self.value is None else f" (before rounding {self.value:.5f})"
        place = f"image {self.index[0]}, position {list(self.index[1:])}"
        return f"{place}: {self.ours}{before}, ONNX Runtime {self.runtime}"


@dataclass(frozen=True)
class Comparison:
    """Differing codes of one tensor.

    Args:
        mismatches: How many codes differ.
        max_steps: Largest difference in quantization steps.
        worst: The difference of that size that was met first.
    """

    mismatches: int = 0
    max_steps: int = 0
    worst: Worst | None = None


@dataclass(frozen=True)
class LayerParity:
    """Codes of one activation quantizer, compared with ONNX Runtime's.

    Args:
        name: Name of the quantizer.
        codes: Number of codes compared.
        free: Simulation, free running.
        forced: Simulation, teacher forced.
        reference: Integer reference; None where it was not run.
    """

    name: str
    codes: int
    free: Comparison
    forced: Comparison
    reference: Comparison | None = None

    @property
    def forced_within_tolerance(self) -> bool:
        """Gate B for this layer. A few codes may differ however small the tensor is."""
        allowed = max(MAX_FORCED_FRACTION * self.codes, _FEW_CODES)
        return self.forced.mismatches <= allowed and self.forced.max_steps <= MAX_FORCED_STEPS

    @property
    def reference_exact(self) -> bool:
        """Gate A for this layer."""
        return self.reference is None or self.reference.mismatches == 0


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
        undisturbed: Whether making the codes visible left the runtime's logits bit-identical.
    """

    images: int
    layers: tuple[LayerParity, ...]
    max_logit_difference: float
    logit_std: float
    top1_agreement: float
    reference_top1_agreement: float | None = None
    undisturbed: bool = True

    @property
    def first_inexact(self) -> LayerParity | None:
        """First layer where the integer reference and the runtime differ (gate A)."""
        return next((layer for layer in self.layers if not layer.reference_exact), None)

    @property
    def first_out_of_tolerance(self) -> LayerParity | None:
        """First layer whose teacher-forced codes leave the tolerance (gate B)."""
        return next((layer for layer in self.layers if not layer.forced_within_tolerance), None)

    @property
    def gate_a(self) -> bool:
        """Integer reference and runtime agree in every code and every top-1 class."""
        return self.first_inexact is None and self.reference_top1_agreement in (None, 1.0)

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
        if (layer := self.first_inexact) is not None and layer.reference is not None:
            found = layer.reference
            return f"{layer.name}: {found.mismatches} of {layer.codes} codes differ from the reference; {found.worst}"
        if (layer := self.first_out_of_tolerance) is not None:
            found = layer.forced
            return f"{layer.name}: {found.mismatches} of {layer.codes} codes differ from the simulation; {found.worst}"
        if not (self.gate_a and self.gate_b):
            return (
                f"every layer is within tolerance, but top-1 agreement is {100 * self.top1_agreement:.2f} %"
            )
        return f"all {len(self.layers)} code tensors agree"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports, with the verdicts."""
        verdicts = {
            "gate_a": self.gate_a,
            "gate_b": self.gate_b,
            "passed": self.passed,
            "verdict": self.verdict(),
        }
        return {**asdict(self), **verdicts}


class RuntimeCodes:
    """Runs a file in ONNX Runtime at full optimisation and reads the codes of every activation quantizer."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        model = onnx.load(path)
        self.tensors = code_tensors(model)
        self.input_name = model.graph.input[0].name
        self.output_name = model.graph.output[0].name
        self._plain = open_session(path, threads=threads)
        self._visible = open_session(_with_visible_codes(model, self.tensors), threads=threads)
        self.undisturbed = True

    def run(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and codes by quantizer name, of a batch of images (N, C, H, W)."""
        feed = {self.input_name: images}
        logits, *codes = self._visible.run([self.output_name, *(t.tensor for t in self.tensors)], feed)
        (plain,) = self._plain.run([self.output_name], feed)
        self.undisturbed &= np.array_equal(plain, logits)
        return plain, {t.name: c for t, c in zip(self.tensors, codes, strict=True)}


def _with_visible_codes(model: onnx.ModelProto, tensors: Iterable[CodeTensor]) -> bytes:
    visible = onnx.ModelProto()
    visible.CopyFrom(model)
    present = {value.name for value in visible.graph.output}
    for tensor in tensors:
        if tensor.tensor not in present:
            visible.graph.output.append(
                onnx.helper.make_tensor_value_info(tensor.tensor, tensor.onnx_type, None)
            )
    return visible.SerializeToString()


def check_parity(
    path: Path,
    module: nn.Module,
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
        module: The module, on the CPU.
        batches: Normalised images (N, C, H, W).
        reference: Also run the integer reference (gate A).
        chunk: Images at a time; every code of a chunk is held in memory twice.
        threads: ONNX Runtime's threads.
        progress: Called with (images done, 0) after every chunk; the total is not known.

    Raises:
        InputError: The file has no activation codes, or is not an export of the module.
    """
    runtime = RuntimeCodes(path, threads=threads)
    tally = _Tally(runtime.tensors)
    executor = _reference(path) if reference else None
    module = module.eval()
    for images in _chunks(batches, chunk):
        logits, codes = runtime.run(images.numpy())
        free = _simulate(module, images, runtime.tensors, None)
        forced = _simulate(module, images, runtime.tensors, codes)
        exact = None if executor is None else executor.run(images.numpy())
        tally.add(codes, logits, free, forced, exact)
        if progress is not None:
            progress(tally.images, 0)
    return tally.result(undisturbed=runtime.undisturbed, with_reference=reference)


def _reference(path: Path) -> Any:
    from metaaug_cli.reference import IntegerExecutor

    return IntegerExecutor(onnx.load(path))


def _chunks(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.float().split(size)


class _Recorder(TorchDispatchMode):
    """Notes the codes of every ``fake_quantize`` call and, with ``forced`` codes, returns those instead."""

    def __init__(self, names: Mapping[int, str], forced: Mapping[str, np.ndarray] | None) -> None:
        super().__init__()
        self._names = names
        self._forced = forced
        self._uses: dict[str, int] = {}
        self.codes: dict[str, np.ndarray] = {}
        self.values: dict[str, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.metaaug.fake_quantize.default:
            return func(*args, **(kwargs or {}))
        x, scale, zero_point, quant_min, quant_max = args
        name = self._name(scale)
        codes = quantize_codes(x, scale, zero_point, quant_min, quant_max)
        self.codes[name] = codes.to(torch.uint8).numpy()
        self.values[name] = x / scale + zero_point
        if self._forced is not None:
            if name not in self._forced:
                raise InputError(
                    f"the ONNX file has no codes of quantizer {name}", hint="export the run again"
                )
            codes = torch.from_numpy(self._forced[name].astype(np.float32))
        return dequantize_codes(codes, scale, zero_point)

    def _name(self, scale: Tensor) -> str:
        name = self._names[scale.data_ptr()]
        self._uses[name] = self._uses.get(name, 0) + 1
        return name if self._uses[name] == 1 else f"{name}.{self._uses[name]}"


@dataclass(frozen=True)
class _Simulated:
    logits: np.ndarray
    codes: Mapping[str, np.ndarray]
    values: Mapping[str, Tensor]


def _simulate(
    module: nn.Module, images: Tensor, tensors: Iterable[CodeTensor], forced: Mapping[str, np.ndarray] | None
) -> _Simulated:
    named = [*module.named_buffers(), *module.named_parameters()]
    names = {
        t.data_ptr(): n.removesuffix(".scale") for n, t in named if n.endswith(".scale") and t.dim() == 0
    }
    with torch.no_grad(), _Recorder(names, forced) as recorder:
        logits = module(images)
    missing = [t.name for t in tensors if t.name not in recorder.codes]
    if missing or not recorder.codes:
        raise InputError(
            f"the simulated network has no quantizer {', '.join(missing) or 'at all'}",
            hint="the file was not exported from this run; export it again",
        )
    return _Simulated(logits.numpy(), recorder.codes, recorder.values)


class _Tally:
    """Sums comparisons over chunks of images."""

    def __init__(self, tensors: tuple[CodeTensor, ...]) -> None:
        self.images = 0
        self._tensors = tensors
        self._codes = dict.fromkeys((t.name for t in tensors), 0)
        self._found: dict[tuple[str, str], Comparison] = {}
        self._logits: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def add(
        self,
        runtime: Mapping[str, np.ndarray],
        logits: np.ndarray,
        free: _Simulated,
        forced: _Simulated,
        exact: tuple[np.ndarray, Mapping[str, np.ndarray]] | None,
    ) -> None:
        for name in self._codes:
            self._codes[name] += runtime[name].size
            self._compare("free", name, free.codes[name], runtime[name], free.values[name])
            self._compare("forced", name, forced.codes[name], runtime[name], forced.values[name])
            if exact is not None:
                self._compare("reference", name, exact[1][name], runtime[name], None)
        self._logits.append((logits, free.logits, None if exact is None else exact[0]))
        self.images += len(logits)

    def _compare(
        self, kind: str, name: str, ours: np.ndarray, runtime: np.ndarray, values: Tensor | None
    ) -> None:
        if ours.shape != runtime.shape:
            raise InputError(
                f"codes of {name} have shape {ours.shape}, ONNX Runtime's {runtime.shape}",
                hint="export the run again",
            )
        before = self._found.get((kind, name), Comparison())
        steps = np.abs(ours.astype(np.int16) - runtime.astype(np.int16))
        largest, worst = int(steps.max(initial=0)), before.worst
        if largest > before.max_steps:
            at = np.unravel_index(int(steps.argmax()), steps.shape)
            value = None if values is None else float(values[at])
            index = (self.images + int(at[0]), *(int(i) for i in at[1:]))
            worst = Worst(index, int(ours[at]), int(runtime[at]), value)
        self._found[kind, name] = Comparison(
            before.mismatches + int(np.count_nonzero(steps)), max(before.max_steps, largest), worst
        )

    def result(self, *, undisturbed: bool, with_reference: bool) -> Parity:
        if not self.images:
            raise InputError("there are no images to check parity on")
        layers = tuple(
            LayerParity(
                name,
                count,
                self._found["free", name],
                self._found["forced", name],
                self._found.get(("reference", name)),
            )
            for name, count in self._codes.items()
        )
        runtime, ours = (np.concatenate([batch[i] for batch in self._logits]) for i in (0, 1))
        agreement = float(np.mean(runtime.argmax(1) == ours.argmax(1)))
        exact_agreement = None
        if with_reference:
            exact = np.concatenate([batch[2] for batch in self._logits if batch[2] is not None])
            exact_agreement = float(np.mean(runtime.argmax(1) == exact.argmax(1)))
        difference = float(np.abs(runtime - ours).max())
        std = float(runtime.std())
        return Parity(self.images, layers, difference, std, agreement, exact_agreement, undisturbed)
