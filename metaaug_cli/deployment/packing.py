"""How codes are stored in an exported file: one graph and one function, four ways to write it.

- ``int8``: codes in 8-bit containers; integer kernels everywhere.
- ``packed``: weight codes under 8 bits stored as uint4 or uint2 and unpacked by ``Cast`` and ``Sub``, which
  the runtime does once while loading; then the same integer kernels.
- ``packed4``: the same in uint4 only, for releases without kernels for 2 bits; ``choose_pack`` asks for it.
- ``native``: weights and activations in the 4-bit and 2-bit ONNX types, for runtimes that want the types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from metaaug_cli.deployment.manifest import Packing
from metaaug_cli.deployment.onnx_view import CODES, MOVEMENT, SCALE, GraphView, activation_range
from metaaug_cli.deployment.runtimes import KEEP_FLOAT_WEIGHTS, WITHOUT_INTEGER_KERNELS, least_release

PackMode = Literal["int8", "packed", "packed4", "native"]
_OPSET_OF_TWO_BITS, _IR_OF_TWO_BITS = 25, 13
_PAIR_LIMIT = 2**15 - 1
_TWO_BITS = {TensorProto.INT2, TensorProto.UINT2}


@dataclass(frozen=True)
class _Weight:
    """A weight in the graph: codes with zero point 0, output channels on axis 0.

    Args:
        dequantize: The node that reads the codes.
        name: Name of the layer.
        codes: int32 values of the int8 codes, at least one, (out, …).
        zero_point_shape: () or (1,) for one zero point, (out,) for one per channel.
    """

    dequantize: onnx.NodeProto
    name: str
    codes: np.ndarray
    zero_point_shape: tuple[int, ...]

    @property
    def channels(self) -> np.ndarray:
        """Codes in one row per zero point, (out, …) or (1, …)."""
        return self.codes.reshape(len(self.codes) if math.prod(self.zero_point_shape) > 1 else 1, -1)

    @property
    def least(self) -> np.ndarray:
        """Least code of each channel or 0, whichever is smaller: minus this is a zero point in any type."""
        return np.minimum(self.channels.min(1), 0)

    @property
    def bits(self) -> int:
        """Bits of the narrowest unsigned type that holds every channel's codes and zero point: 2, 4 or 8."""
        if not self.codes.any():
            return 8  # a dead layer fits any type: it must not ask for a newer runtime than the others
        span = int((np.maximum(self.channels.max(1), 0) - self.least).max())
        return next(bits for bits in (2, 4, 8) if span < 2**bits)

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """One value per row of ``channels``, shaped to broadcast over the codes."""
        return values.reshape(-1, *[1] * (self.codes.ndim - 1))


def _weights(model: onnx.ModelProto) -> Iterator[_Weight]:
    view = GraphView(model)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in view.constants:
            continue
        name = view.optional(node, 2)
        if name is None or not view.has_known_grid(node):
            continue
        codes, zero_point = view.constant(node.input[0]), view.constant(name)
        if codes.dtype == np.int8 and codes.ndim and codes.size and not zero_point.any():
            layer = node.input[0].removesuffix(CODES)
            yield _Weight(node, layer, codes.astype(np.int32), zero_point.shape)


def pack(model: onnx.ModelProto, mode: PackMode, *, reduce_range: bool = False) -> Packing:
    """Store a model's codes as asked, as the last change to it; its function stays the same.

    Args:
        model: A model in the ``int8`` form, changed in place.
        mode: How to store codes under 8 bits.
        reduce_range: Make 8-bit weights exact on CPUs that add products in 16 bits (``avoid_saturation``).

    Returns:
        What it takes to load the result.
    """
    if reduce_range:
        avoid_saturation(model)
    changed = 0
    if mode in ("packed", "packed4"):
        pack_weights(model, least_bits=4 if mode == "packed4" else 2)
    elif mode == "native":
        changed = use_native_types(model)
    options = WITHOUT_INTEGER_KERNELS if mode == "native" and changed else {}
    if _has_float_weights_behind_codes(model):
        options = {**options, **KEEP_FLOAT_WEIGHTS}
    stored = "packed" if mode == "packed4" else mode
    return Packing(mode=stored, least_onnxruntime=least_release(model), session_options=options)


def _has_float_weights_behind_codes(model: onnx.ModelProto) -> bool:
    """Whether a transposed convolution reads quantized values and float weights.

    ONNX Runtime would quantize those weights by a rule of its own while loading.
    """
    dequantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    transposed = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
    return any(n.input[0] in dequantized and n.input[1] not in dequantized for n in transposed)


def pack_weights(model: onnx.ModelProto, *, least_bits: int = 2) -> int:
    """Store weight codes in 4 or 2 bits in front of ``Cast`` and ``Sub``.

    Args:
        model: A model in the ``int8`` form, changed in place.
        least_bits: 2, or 4 to store 2-bit codes in 4 bits too.

    Returns:
        How many weights were packed.
    """
    count = 0
    for weight in list(_weights(model)):
        if weight.bits == 8:
            continue
        stored = weight.codes - weight.along_channels(weight.least)
        dtype = ml_dtypes.uint4 if max(weight.bits, least_bits) == 4 else ml_dtypes.uint2
        names = [f"{weight.name}.{part}" for part in ("packed_codes", "unsigned_codes", "packed_zero_point")]
        _replace_constant(model, weight.dequantize.input[0], _constant(stored, dtype, names[0]))
        zero_point = weight.along_channels(-weight.least)
        model.graph.initializer.append(_constant(zero_point, np.int8, names[2]))
        unpack = [
            helper.make_node("Cast", [names[0]], [names[1]], name=f"{weight.name}/Cast", to=TensorProto.INT8),
            helper.make_node(
                "Sub", [names[1], names[2]], [weight.dequantize.input[0]], name=f"{weight.name}/Sub"
            ),
        ]
        _insert_before(model.graph, weight.dequantize, unpack)
        count += 1
    if count:
        _declare_types(model)
    return count


def use_native_types(model: onnx.ModelProto) -> int:
    """Write codes under 8 bits in the 4-bit and 2-bit ONNX types; returns how many tensors were."""
    count = 0
    for weight in list(_weights(model)):
        if weight.bits < 8:
            _native_weight(model, weight)
            count += 1
    view = GraphView(model)
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        count += _native_activation(model, view, node)
    if count:
        _remove_unused_constants(model)
        _declare_types(model)
    return count


def _native_weight(model: onnx.ModelProto, weight: _Weight) -> None:
    half = 2 ** (weight.bits - 1)
    signed = bool((weight.codes >= -half).all() and (weight.codes < half).all())
    zero_point = np.zeros_like(weight.least) if signed else -weight.least
    dtype = getattr(ml_dtypes, f"{'int' if signed else 'uint'}{weight.bits}")
    codes = weight.codes + weight.along_channels(zero_point)
    zero_point = zero_point.reshape(weight.zero_point_shape)
    name, zero_point_name = weight.dequantize.input[0], weight.dequantize.input[2]
    _replace_constant(model, name, _constant(codes, dtype, name))
    _replace_constant(model, zero_point_name, _constant(zero_point, dtype, zero_point_name))


def _native_activation(model: onnx.ModelProto, view: GraphView, quantize: onnx.NodeProto) -> bool:
    """Give one quantizer a 4-bit or 2-bit type; bounds inside that type become bounds of the float values."""
    users = view.consumers[quantize.output[0]]
    if len(users) != 1 or users[0].op_type != "Clip":
        return False
    clip = users[0]
    readers = view.consumers[clip.output[0]]
    if any(reader.op_type != "DequantizeLinear" for reader in readers):
        return False  # a moved code tensor: the operators that move it want 8 bits
    low, high = (int(view.constant(clip.input[i])) for i in (1, 2))
    bits = next((b for b in (2, 4) if high < 2**b), None)
    if bits is None:
        return False
    dtype = ml_dtypes.uint2 if bits == 2 else ml_dtypes.uint4
    zero_point = view.constant(quantize.input[2])
    _replace_constant(model, quantize.input[2], _constant(zero_point, dtype, quantize.input[2]))
    if (low, high) != (0, 2**bits - 1):
        _bound_values(model, view, quantize, low - int(zero_point), high - int(zero_point))
    quantize.output[0] = clip.output[0]
    model.graph.node.remove(clip)
    return True


def _bound_values(
    model: onnx.ModelProto, view: GraphView, quantize: onnx.NodeProto, low: int, high: int
) -> None:
    """Bound the values before a quantizer to ``low`` and ``high`` steps, which round back to those codes.

    ONNX Runtime fails to optimise a Clip in front of a 4-bit quantizer; Max and Min it leaves alone.
    """
    scale = view.constant(quantize.input[1])
    name = quantize.input[1].removesuffix(SCALE)
    for op, steps, bound in (("Max", low, "least_value"), ("Min", high, "greatest_value")):
        value = np.asarray(np.float32(steps) * scale, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}.{bound}"))
        bounded = f"{name}.{op.lower()}"
        inputs = [quantize.input[0], f"{name}.{bound}"]
        _insert_before(model.graph, quantize, [helper.make_node(op, inputs, [bounded], name=f"{name}/{op}")])
        quantize.input[0] = bounded


def saturating_layers(model: onnx.ModelProto) -> list[str]:
    """Layers that x86 without VNNI may get wrong: its kernels add pairs of products in 16 bits."""
    view = GraphView(model)
    return [weight.name for weight in _weights(model) if _may_saturate(view, weight)]


def _may_saturate(view: GraphView, weight: _Weight) -> bool:
    readers = view.consumers[weight.dequantize.output[0]]
    if not readers:
        return False
    greatest = _greatest_code(view, readers[0].input[0])
    ordered = np.sort(weight.codes.reshape(len(weight.codes), -1), axis=1)
    pair = (
        2 * np.abs(ordered[:, [0, -1]])
        if ordered.shape[1] < 2
        else np.abs(np.stack([ordered[:, :2].sum(1), ordered[:, -2:].sum(1)], 1))
    )
    return greatest * int(pair.max(initial=0)) > _PAIR_LIMIT


def _greatest_code(view: GraphView, name: str) -> int:
    """Greatest unsigned code a layer can read; 255 where the graph does not tell."""
    node = view.producer.get(name)
    while node is not None and node.op_type in MOVEMENT:
        node = view.producer.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return 255
    source = view.producer.get(node.input[0])
    while source is not None and source.op_type in MOVEMENT:
        source = view.producer.get(source.input[0])
    if source is not None and source.op_type == "Clip":
        source = view.producer.get(source.input[0])
    if source is None or source.op_type != "QuantizeLinear" or not view.has_known_grid(source):
        return 255
    return activation_range(view, source)[1]


def avoid_saturation(model: onnx.ModelProto) -> list[str]:
    """Store the weights of ``saturating_layers`` as uint8 with zero point 128; returns the layers' names.

    The function stays the same bit for bit. Kernels of two unsigned operands widen before they add, so
    they are exact on every CPU, and slower than the mixed kernels.
    """
    view = GraphView(model)
    changed = []
    for weight in [w for w in _weights(model) if _may_saturate(view, w)]:
        codes, zero_point = weight.dequantize.input[0], weight.dequantize.input[2]
        _replace_constant(model, codes, _constant(weight.codes + 128, np.uint8, codes))
        _replace_constant(
            model, zero_point, _constant(np.full(weight.zero_point_shape, 128), np.uint8, zero_point)
        )
        changed.append(weight.name)
    return changed


def _constant(values: np.ndarray, dtype: Any, name: str) -> TensorProto:
    """A constant tensor of integers in a narrower type.

    Raises:
        AssertionError: One does not fit the type; only a bug of this module can be the reason.
    """
    narrow = values.astype(dtype)
    if not np.array_equal(narrow.astype(np.int32), values):
        raise AssertionError(f"{name} does not fit {np.dtype(dtype)}: {values.min()} to {values.max()}")
    return numpy_helper.from_array(narrow, name)


def _replace_constant(model: onnx.ModelProto, old: str, new: TensorProto) -> None:
    kept = [i for i in model.graph.initializer if i.name != old]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, new])
    for info in [v for v in model.graph.value_info if v.name == old]:
        model.graph.value_info.remove(info)


def _insert_before(graph: onnx.GraphProto, anchor: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    position = next(i for i, node in enumerate(graph.node) if node.output[:] == anchor.output[:])
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)


def _remove_unused_constants(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _declare_types(model: onnx.ModelProto) -> None:
    """Raise opset and IR version where 2-bit types are used, and drop value types that packing changed."""
    types = {i.data_type for i in model.graph.initializer}
    if types & _TWO_BITS:
        model.ir_version = max(model.ir_version, _IR_OF_TWO_BITS)
        opset = next(o for o in model.opset_import if o.domain in ("", "ai.onnx"))
        opset.version = max(opset.version, _OPSET_OF_TWO_BITS)
    eight_bits = {TensorProto.UINT8, TensorProto.INT8}
    kept = [v for v in model.graph.value_info if v.type.tensor_type.elem_type not in eight_bits]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
