"""Names that torch's graph modules keep for themselves."""

import pytest
import torch
from torch import fx, nn

from metaaug_cli.graph.graph_tools import register_buffer
from metaaug_cli.graph.names import free_name


@pytest.mark.parametrize("name", ["layer1.0.conv", "conv", "", "block.code", "graph2.weight"])
def test_usual_names_stay(name):
    assert free_name(name) == name


@pytest.mark.parametrize(
    ("name", "free"), [("code", "code_"), ("graph.0.weight", "graph_.0.weight"), ("meta", "meta_")]
)
def test_taken_names_get_an_underscore(name, free):
    assert free_name(name) == free
    assert free_name(free) == free


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile", "shape_env"])
def test_a_graph_module_holds_the_new_name(name):
    root = nn.Module()
    path = register_buffer(root, free_name(f"{name}.weight"), torch.zeros(1))
    graph = fx.Graph()
    graph.output(graph.get_attr(path))
    assert fx.GraphModule(root, graph)().tolist() == [0.0]
