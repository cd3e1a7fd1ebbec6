"""From the user's network to a functional ATen graph with a free batch dimension.

``torch.export`` does the tracing, so functional adds, in-place operators, control flow on shapes and
``.pt2`` files all arrive as the same small operator set. ``normalize`` then brings the graph to the
form that the rest of the package reads.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from metaaug_cli.errors import GraphError, InputError
from metaaug_cli.graph.graph_tools import lookup, register_buffer
from metaaug_cli.graph.names import free_name, owner_of
from metaaug_cli.graph.normalize import normalize
from metaaug_cli.graph.requirements import (
    line_in_text,
    require_eval_mode,
    require_fixed_state,
    require_no_chance,
    require_one_image_input,
    wrong_input_count,
)
from metaaug_cli.graph.rewrites import rewrite

_BATCH_NORM_OF_NOTHING = torch.ops.aten._native_batch_norm_legit.no_stats
_LARGEST_BATCH = 1 << 16
_LONGEST_SUMMARY = 300


def capture(network: nn.Module | ExportedProgram, input_size: tuple[int, int, int]) -> fx.GraphModule:
    """Capture a network in normal form (batch norms folded, one tensor in, one tensor out).

    Args:
        network: An eval-mode module, or a program loaded from a ``.pt2`` file.
        input_size: (C, H, W) of the images it takes.

    Raises:
        GraphError: The network cannot be traced, has several inputs or outputs, fixes its batch size, writes
            to a buffer, draws random numbers, or is a program in training mode or with channels last.
        InputError: It does not run on images of this size.
    """
    module = capture_unfolded(network, input_size)
    if module.graph.find_nodes(op="call_function", target=_BATCH_NORM_OF_NOTHING):
        raise GraphError(
            "the network has a batch norm that stores no statistics and takes those of each batch",
            hint="integers need fixed ones: train with track_running_stats=True",
        )
    return normalize(module)


def capture_unfolded(
    network: nn.Module | ExportedProgram, input_size: tuple[int, int, int]
) -> fx.GraphModule:
    """Capture a network as traced, its batch norms still operators of their own.

    Args:
        network: As for ``capture``.
        input_size: As for ``capture``.

    Raises:
        GraphError: As for ``capture``.
        InputError: As for ``capture``.
    """
    program = export_program(network, input_size)
    require_one_image_input(program, input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions({})
    require_eval_mode(program)
    require_fixed_state(program)
    require_no_chance(program)
    module = _plain_graph_module(program)
    for node in module.graph.nodes:
        node.meta["owner"] = owner_of(node)
    rewrite(module)
    module.recompile()
    return module


def export_program(network: nn.Module | ExportedProgram, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Trace a network with a free batch dimension; a program is kept, but for names torch has no room for.

    Raises:
        GraphError: The network cannot be traced; names the user's line. Or two names would fall together.
        InputError: It does not run on images of this size either.
    """
    if isinstance(network, ExportedProgram):
        return with_free_names(network)
    required = _required_inputs(network)
    if required is not None and required != 1:
        raise wrong_input_count(required)
    example = torch.zeros(2, *input_size)
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    try:
        with _quiet_export(), torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises many kinds; all mean "cannot be traced"
        raise _does_not_run(network, example) or _untraceable(error) from error
    return with_free_names(program)


def _required_inputs(network: nn.Module) -> int | None:
    """How many arguments ``forward`` cannot do without; None where its signature does not tell."""
    parameters = inspect.signature(network.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return sum(p.default is p.empty for p in parameters)


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Export without torch's own log lines and prints, and without fused attention that hides its linears."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch_logger = logging.getLogger("torch")
    level = torch_logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    torch_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch_logger.setLevel(level)


def _does_not_run(network: nn.Module, example: Tensor) -> InputError | GraphError | None:
    """The error of a network that fails on such images, traced or not, or returns an object; else None."""
    try:
        with torch.no_grad():
            output = network(example)
    except Exception as error:  # the user's code may raise anything
        text = str(error).strip()
        where = _at(_user_line(error))
        if wrong := re.search(r"to have (\d+) channels, but got (\d+) channels", text):
            wants, gets = wrong.groups()
            return InputError(
                f"the network takes images of {wants} channels, the preprocessing gives {gets}{where}",
                hint="--mean and --std take one value per channel",
            )
        _, _, height, width = example.shape
        return InputError(
            f"the network does not run on images of {height}x{width} pixels{where}: {_first_line(error)}",
            hint="check that --size is what the network was trained with; its forward(x) gets one float "
            "tensor (N, C, H, W)",
        )
    plain = (Tensor, bool, int, float, str, type(None))
    kind = next((type(leaf).__name__ for leaf in tree_leaves(output) if not isinstance(leaf, plain)), None)
    if kind is None:
        return None
    return GraphError(
        f"the network returns an object of type {kind}; metaaug needs one tensor of logits",
        hint="wrap the network in a module whose forward(x) returns the logits alone",
    )


def _untraceable(error: Exception) -> GraphError:
    text = str(error).strip()
    summary = _first_line(error)
    fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
    if fixed:
        summary = f"its code works for batches of {fixed.group(1)} images only"
    where = _at(_user_line(error) or line_in_text(text))
    return GraphError(
        f"the network cannot be traced{where}: {summary}",
        hint="make that line independent of tensor values and of the batch size (no Python `if` on a tensor, "
        "no fixed batch in view/reshape), or export the network yourself with a dynamic batch dimension and "
        "pass the .pt2 file",
    )


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:_LONGEST_SUMMARY] for line in lines if line), type(error).__name__)


def _at(place: str | None) -> str:
    return f" at {place}" if place else ""


def _user_line(error: BaseException) -> str | None:
    """``file:line (source)`` of the innermost traceback frame that is not torch's own code."""
    import traceback

    frames = [
        frame
        for cause in _causes(error)
        for frame in traceback.extract_tb(cause.__traceback__)
        if not re.search(r"[/\\](torch|metaaug_cli)[/\\]", frame.filename)
        and frame.line
        and "<" not in frame.filename
    ]
    frames = [f for f in frames if "/lib/python" not in f.filename or "site-packages" in f.filename]
    if not frames:
        return None
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def with_free_names(program: ExportedProgram) -> ExportedProgram:
    """The program under names that a graph module can hold; itself where it has no others.

    Raises:
        GraphError: Another tensor has the new name already.
    """
    names = {s.target for s in program.graph_signature.input_specs if s.target is not None}
    taken = {name: free_name(name) for name in names if free_name(name) != name}
    if not taken:
        return program
    for old, new in taken.items():
        if new in names:
            raise GraphError(
                f"the network has both `{old}` and `{new}`, and the first would be stored as the second",
                hint=f"rename `{old.partition('.')[0]}`: torch's graphs have an attribute of that name",
            )
    signature = copy.deepcopy(program.graph_signature)
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target is not None:
            spec.target = free_name(spec.target)
    return ExportedProgram(
        program.graph_module,
        program.graph,
        signature,
        {free_name(name): value for name, value in program.state_dict.items()},
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        {free_name(name): value for name, value in program.constants.items()},
        verifiers=program.verifiers,
    )


def _plain_graph_module(program: ExportedProgram) -> fx.GraphModule:
    """The program as a GraphModule with one placeholder, one output and parameters as get_attr nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lifted = program.module()
    assert isinstance(lifted, fx.GraphModule)
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in lifted.graph.nodes:
        if node.op == "call_module" and not node.users:
            continue  # torch's own guards on the input shape
        if node.target is torch.ops.aten.copy_.default and not node.users:
            continue  # a forward that changes its image in place writes the change back for its caller
        if node.op == "output":
            (result,) = [n for n in node.all_input_nodes if n in copies]
            graph.output(copies[result])
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    root = nn.Module()
    tensors = {**dict(lifted.named_parameters()), **dict(lifted.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = tensors[node.target] if node.target in tensors else lookup(lifted, node.target)
            node.target = register_buffer(root, str(node.target), value.detach())
    return fx.GraphModule(root, graph)
