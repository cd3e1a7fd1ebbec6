"""What a network must be like to be quantized, each told as one line that names the user's own."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from metaaug_cli.errors import GraphError, InputError
from metaaug_cli.graph.graph_tools import option
from metaaug_cli.graph.names import owner_of
from metaaug_cli.graph.ops import is_activation

_TRAINING_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_DYNAMIC_BATCH = "export it with dynamic_shapes=({0: torch.export.Dim('batch')},)"


def require_one_image_input(program: ExportedProgram, input_size: tuple[int, int, int]) -> None:
    """Raise unless a program takes any number of images of ``input_size``, (C, H, W), and gives one tensor.

    Raises:
        GraphError: Another number of inputs or outputs, a batch size that is not free, or channels last.
        InputError: Images of another size.
    """
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    user_names = set(program.graph_signature.user_inputs)
    images = [n for n in inputs if n.name in user_names]
    if len(images) != 1 or not isinstance(images[0].meta.get("val"), Tensor):
        raise wrong_input_count(len(images))
    shape = images[0].meta["val"].shape
    _require_any_batch(shape[0])
    if tuple(shape[1:]) != input_size:
        raise _wrong_image(shape, input_size)
    outputs = program.graph_signature.user_outputs
    if len(outputs) != 1:
        raise GraphError(
            f"the network returns {len(outputs)} values; metaaug needs one tensor of logits",
            hint="wrap the network in a module that returns the classification logits only",
        )


def wrong_input_count(count: int) -> GraphError:
    """The error of a network that does not take one image tensor."""
    return GraphError(
        f"the network takes {count} inputs; metaaug quantizes networks that take one image tensor",
        hint="wrap the network in a module whose forward(x) supplies the other inputs",
    )


def _require_any_batch(size: int | torch.SymInt) -> None:
    if isinstance(size, int):
        raise GraphError(f"the exported program fixes its batch size to {size}", hint=_DYNAMIC_BATCH)
    if not size.node.expr.is_symbol:
        formula = re.sub(r"\b[a-z]+\d+\b", "batch", str(size))
        raise GraphError(
            f"the exported program takes batches of {formula} images, not any number", hint=_DYNAMIC_BATCH
        )


def _wrong_image(shape: torch.Size, input_size: tuple[int, int, int]) -> GraphError | InputError:
    sides = tuple(shape[1:])
    if len(sides) == 3 and sides[-1] == input_size[0] != sides[0]:
        return GraphError(
            f"the exported program takes images with their channels last, {sides}",
            hint="export it with the channels first: wrap the network in a module whose forward(x) calls it "
            "with x.permute(0, 2, 3, 1)",
        )
    return InputError(
        f"the network takes images of {sides}, the preprocessing gives {input_size}",
        hint=f"pass the size the network was exported with, --size {_size_flag(shape)}; "
        "--mean and --std take one value per channel",
    )


def _size_flag(shape: torch.Size) -> str:
    """Height and width as ``--size`` takes them."""
    *_, height, width = shape
    return f"{height}" if height == width else f"{height}x{width}"


def require_eval_mode(program: ExportedProgram) -> None:
    """Raise for a batch norm that takes the statistics of each batch.

    Raises:
        GraphError: There is one; named.
    """
    for node in program.graph.find_nodes(op="call_function", target=_TRAINING_BATCH_NORM):
        statistics = node.args[3]
        assert isinstance(statistics, fx.Node)
        buffers = program.graph_signature.inputs_to_buffers
        stored = buffers.get(statistics.name, statistics.name)
        name = stored.rpartition(".")[0] or stored
        raise GraphError(
            f"the network is in training mode: its batch norm `{name}` uses the statistics of each batch",
            hint="call model.eval() before torch.export.export; a forward of your own must say "
            "training=self.training, not training=True",
        )


def require_fixed_state(program: ExportedProgram) -> None:
    """Raise for a forward that writes to a buffer: an integer network has no state.

    Raises:
        GraphError: There is such a write; the buffer and, where known, the line are named.
    """
    changed = program.graph_signature.buffers_to_mutate
    for node in program.graph.nodes:
        if node.name in changed:
            raise GraphError(
                f"the network changes its buffer `{changed[node.name]}` in its forward{at_line(node)}",
                hint="an integer network keeps no state: write to the buffer in training only "
                "(if self.training: ...)",
            )


def require_no_chance(program: ExportedProgram) -> None:
    """Raise for an operator that draws random numbers.

    Raises:
        GraphError: There is one; it and, where known, the line are named.
    """
    for node in program.graph.nodes:
        if node.op == "call_function" and _draws(node):
            raise GraphError(
                f"the network draws random numbers ({node.target}) in its forward{at_line(node)}",
                hint="draw in training only (if self.training: ...; F.dropout takes training=self.training), "
                "or keep numbers drawn once in a buffer",
            )


def _draws(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if any(option(node, name) is False for name in ("train", "training")):
        return False
    return option(node, "dropout_p") != 0.0


def require_free_batch(module: fx.GraphModule) -> None:
    """Raise for a graph whose operators leave one batch size only.

    Raises:
        GraphError: It is such a graph.
    """
    image = next(n for n in module.graph.nodes if n.op == "placeholder")
    if isinstance(image.meta["val"].shape[0], int):
        raise GraphError(
            f"an operator of the network fixes the batch size to {image.meta['val'].shape[0]}",
            hint="make its forward independent of the batch size (no fixed batch in view or reshape)",
        )


def require_single_tensors(module: fx.GraphModule) -> None:
    """Raise for an operator with several results, which cannot be cut.

    Raises:
        GraphError: There is one; it and the user's line or module are named.
    """
    for node in module.graph.nodes:
        if node.op != "call_function" or is_activation(node):
            continue
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            continue
        raise GraphError(
            f"the operator {node.target} gives several values and cannot be cut into blocks{at_line(node)}",
            hint="use operators that give one tensor, or wrap the network so that this part is left out",
        )


def at_line(node: fx.Node) -> str:
    """`` at FILE:LINE (source)`` of the user's code that made a node, or else ``, in module `NAME` ``."""
    if place := line_in_text(node.meta.get("stack_trace") or ""):
        return f" at {place}"
    owner = owner_of(node)
    return f", in module `{owner}`" if owner else ""


def line_in_text(text: str) -> str | None:
    """``FILE:LINE (source)`` of the last frame in a printed trace that is not torch's own code."""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*(?:\n +(?!File )([^\n]+))?', text)
    own = [frame for frame in frames if not re.search(r"[/\\]torch[/\\]", frame[0])]
    if not own:
        return None
    path, number, source = own[-1]
    return f"{path}:{number} ({source.strip()})" if source else f"{path}:{number}"
