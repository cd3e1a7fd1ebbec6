"""ONNX Runtime: open a file with settings that are exact, and count what it runs as integers."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx

from metaaug_cli.deployment.external_data import require_external_data
from metaaug_cli.deployment.runtimes import SUPPORT, WITHOUT_INTEGER_KERNELS, installed_release, storage_of
from metaaug_cli.errors import InputError, MetaAugError

if TYPE_CHECKING:
    import onnxruntime

_LONGEST = 500
_FATAL_ONLY = 4  # every failure also raises
EXACT_OPTION = "session.x64quantprecision"
_VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}

_KIND_OF = {
    "Conv": "Conv",
    "FusedConv": "Conv",
    "NhwcFusedConv": "Conv",
    "QLinearConv": "Conv",
    "ConvInteger": "Conv",
    "ConvTranspose": "ConvTranspose",
    "Gemm": "Gemm",
    "FusedGemm": "Gemm",
    "QGemm": "Gemm",
    "MatMul": "MatMul",
    "FusedMatMul": "MatMul",
    "MatMulNBits": "MatMul",
    "QLinearMatMul": "MatMul",
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "Add": "Add",
    "QLinearAdd": "Add",
    "Mul": "Mul",
    "QLinearMul": "Mul",
    "Concat": "Concat",
    "QLinearConcat": "Concat",
    "MaxPool": "MaxPool",
    "NhwcMaxPool": "MaxPool",
    "AveragePool": "AveragePool",
    "QLinearAveragePool": "AveragePool",
    "GlobalAveragePool": "GlobalAveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "ReduceMean": "ReduceMean",
    "QLinearReduceMean": "ReduceMean",
    "Sigmoid": "Sigmoid",
    "QLinearSigmoid": "Sigmoid",
    "LeakyRelu": "LeakyRelu",
    "QLinearLeakyRelu": "LeakyRelu",
    "Softmax": "Softmax",
    "QLinearSoftmax": "Softmax",
    "Pad": "Pad",
    "Resize": "Resize",
}
_INTEGER_TYPES = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
_MOVED_VALUES = {"Split", "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"}
_INTEGER_IF_FED = {"MaxPool", "Concat", "Pad", "Resize"} | _MOVED_VALUES
_ALWAYS_INTEGER = {"NhwcMaxPool", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
_DATA_MOVEMENT = {
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "Shape",
    "Flatten",
}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "Clip", "Cast", "Identity", "Constant"}


@dataclass(frozen=True)
class KernelCount:
    """What ONNX Runtime runs after its own optimisation.

    Args:
        integer: Operator kind (Conv, Gemm, Add, ...) to the number of its integer kernels.
        floating: The same for nodes left in float.
        float_nodes: Names of the nodes left in float, as ``Kind name``, in graph order.
    """

    integer: Mapping[str, int]
    floating: Mapping[str, int]
    float_nodes: tuple[str, ...]

    def of(self, *kinds: str) -> tuple[int, int]:
        """(integer kernels, all kernels) over some kinds, every kind by default."""
        names = kinds or tuple({*self.integer, *self.floating})
        integer = sum(self.integer.get(k, 0) for k in names)
        return integer, integer + sum(self.floating.get(k, 0) for k in names)

    def to_dict(self) -> dict[str, object]:
        """Plain data for reports."""
        return {
            "integer": dict(self.integer),
            "float": dict(self.floating),
            "float_nodes": list(self.float_nodes),
        }


def open_session(
    model: Path | bytes,
    *,
    optimize: Literal["all", "none"] = "all",
    threads: int | None = None,
    exact: bool = True,
    options: Mapping[str, str] | None = None,
    save_optimized: Path | None = None,
    reuse_memory: bool | None = None,
) -> onnxruntime.InferenceSession:
    """Open a file on the CPU.

    Args:
        model: Path or serialized model.
        optimize: All of ONNX Runtime's graph optimisations, or none.
        threads: Threads per operator; None leaves the choice to ONNX Runtime.
        exact: On x86 without VNNI, ask for kernels that do not saturate 16-bit sums.
        options: More session configuration entries.
        save_optimized: Where to write the graph that is really run.
        reuse_memory: Let tensors share buffers; None does, except for files of 4- and 2-bit types (told by
            the session option they need) in releases that give them buffers too small.

    Raises:
        InputError: ONNX Runtime refuses the file.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = _FATAL_ONLY
    level = ort.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimize == "all" else level.ORT_DISABLE_ALL
    if reuse_memory is None:
        narrow_types = WITHOUT_INTEGER_KERNELS.items() <= dict(options or {}).items()
        release = installed_release(ort.__version__)
        reuse_memory = not narrow_types or release >= SUPPORT["native 4 bits"].exact
    settings.enable_mem_reuse = reuse_memory
    if threads is not None:
        settings.intra_op_num_threads = threads
    if save_optimized is not None:
        settings.optimized_model_filepath = str(save_optimized)
    entries = {EXACT_OPTION: "1"} if exact and needs_exact_option() else {}
    for key, value in {**entries, **(options or {})}.items():
        settings.add_session_config_entry(key, value)
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # every failure class of the runtime derives from Exception only
        read = _read(model) if isinstance(model, Path) else None
        if isinstance(model, Path) and read is not None:
            require_external_data(read, model)
        hint = "its 4- and 2-bit types need the session options that `metaaug inspect` shows"
        is_native = read is not None and any("native" in key for key in storage_of(read))
        name = model if isinstance(model, Path) else "the model"
        summary = str(error).strip().splitlines()[0][:400]
        raise InputError(
            f"ONNX Runtime {ort.__version__} does not load {name}: {summary}",
            hint=hint if is_native else None,
        ) from error


def _read(path: Path) -> onnx.ModelProto | None:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception:  # protobuf raises its own classes, which derive from Exception only
        return None


def needs_exact_option() -> bool:
    """Whether this CPU may saturate products of 8-bit activations and 8-bit weights.

    x86 without VNNI adds pairs of products in 16 bits. Where the flags cannot be read, assume the worst: the
    option costs time, never correctness.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "x86", "i686"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return True
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not _VNNI_FLAGS & set(flags.split())


def count_kernels(model: Path | bytes, *, options: Mapping[str, str] | None = None) -> KernelCount:
    """Count integer and float kernels in the graph that ONNX Runtime runs at full optimisation."""
    return classify_nodes(optimized_graph(model, options=options))


def optimized_graph(model: Path | bytes, *, options: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The graph after ONNX Runtime's own full optimisation.

    Raises:
        InputError: ONNX Runtime refuses the file.
        MetaAugError: There is no room for the graph in the folder of temporary files.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        try:
            open_session(model, threads=1, options=options, save_optimized=saved)
            return onnx.load(saved)
        except Exception as error:  # of the runtime, or of protobuf on half a file
            open_session(model, threads=1, options=options)
            raise MetaAugError(
                f"ONNX Runtime cannot write its graph into {tempfile.gettempdir()}",
                hint="free some space there, or set TMPDIR to another folder",
            ) from error


def classify_nodes(model: onnx.ModelProto) -> KernelCount:
    """Sort the nodes of an optimised graph by kind and by the type they work on."""
    types = _tensor_types(model.graph)
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    names: list[str] = []
    for node in model.graph.node:
        kind = _KIND_OF.get(node.op_type)
        if kind is None and node.op_type in _DATA_MOVEMENT | _QUANTIZERS:
            continue
        if _is_integer(node, types):
            integer[kind or node.op_type] += 1
        elif types.get(node.output[0]) != onnx.TensorProto.INT64:
            floating[kind or node.op_type] += 1
            names.append(f"{kind or node.op_type} {node.name or node.output[0]}")
    return KernelCount(dict(integer), dict(floating), tuple(names))


def _is_integer(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    if node.op_type.startswith("QLinear") or node.op_type == "QGemm" or node.op_type in _ALWAYS_INTEGER:
        return True
    return node.op_type in _INTEGER_IF_FED and types.get(node.input[0]) in _INTEGER_TYPES


def _tensor_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types of tensors, as far as the operators and the constants of a graph tell them."""
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {i.name: i.data_type for i in graph.initializer}
    # The runtime does not save its nodes in execution order.
    pending = list(graph.node)
    while True:
        waiting = []
        for node in pending:
            output_type = _output_type(node, types)
            if output_type is None:
                waiting.append(node)
            for name in node.output if output_type is not None else ():
                types.setdefault(name, output_type)
        if len(waiting) == len(pending):
            return types
        pending = waiting


def _output_type(node: onnx.NodeProto, types: Mapping[str, int]) -> int | None:
    """Element type of a node's outputs, None while its inputs are unknown."""
    if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return onnx.TensorProto.FLOAT
    if node.op_type in ("Shape", "Size"):
        return onnx.TensorProto.INT64
    if node.op_type == "Cast":
        return next(a.i for a in node.attribute if a.name == "to")
    if node.op_type in _OUTPUT_ZERO_POINT:
        position = _OUTPUT_ZERO_POINT[node.op_type]
        name = node.input[position] if position < len(node.input) else ""
        missing = onnx.TensorProto.FLOAT if node.op_type == "QGemm" else onnx.TensorProto.UINT8
        return types.get(name) if name else missing
    return next((types[name] for name in node.input if name in types), None)


_OUTPUT_ZERO_POINT = {
    "QuantizeLinear": 2,
    "QLinearConv": 7,
    "QLinearMatMul": 7,
    "QLinearAdd": 7,
    "QLinearMul": 7,
    "QGemm": 8,
    "QLinearConcat": 1,
}
