"""Where networks are cut: residual blocks whole, chains layer by layer, wide segments split."""

from itertools import pairwise

import pytest
import torch
from networks import FAMILIES, SIZE, family, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.ops import Role, is_activation, role
from metaaug_cli.graph.placement import layer_name
from metaaug_cli.graph.stages import cut_stages, stage_macs, value_bytes

OPTIONS = {
    "blocks": {},
    "split": {"max_layers": 2},
    "singly": {"max_layers": 1},
    "layers": {"granularity": "layer"},
}


def layers_of(stages):
    return [[layer_name(n) for n in stage.layers] for stage in stages]


def cut(network, **options):
    return cut_stages(capture(trained(network), SIZE).graph, **options)


def test_residual_blocks_are_exactly_the_cuts():
    stages = cut_stages(family("residual").graph)
    assert layers_of(stages) == [
        ["stem.0"],
        ["layer1.0.first.0", "layer1.0.second.0"],
        ["layer1.1.first.0", "layer1.1.second.0", "layer1.1.shortcut.0"],
        ["layer2.0.first.0", "layer2.0.second.0"],
        ["fc"],
    ]
    assert [s.name for s in stages] == ["stem.0", "layer1.0", "layer1.1", "layer2.0", "fc"]
    assert all(len(s.inputs) == len(s.outputs) == 1 for s in stages)
    ends = [str(s.outputs[0].target).split(".")[1] for s in stages]
    assert ends == ["relu"] * 4 + ["linear"]  # the ReLU after an addition belongs to its block


def test_inverted_residuals_stay_whole_with_and_without_a_shortcut():
    stages = cut_stages(family("mobile").graph)
    inner = [[f"features.{i}.conv.{k}.0" for k in (0, 2, 4)] for i in (1, 2, 3)]
    assert layers_of(stages) == [["features.0.0"], *inner, ["classifier.1"]]
    adds = [sum("add" in str(n.target) for n in s.nodes) for s in stages]
    assert adds == [0, 0, 1, 0, 0]


def test_a_chain_is_cut_at_every_layer():
    stages = cut_stages(family("vgg").graph)
    names = ["features.0", "features.3", "features.5", "classifier.0", "classifier.3"]
    assert layers_of(stages) == [[name] for name in names]
    assert [s.name for s in stages] == names
    shapes = [tuple(s.outputs[0].meta["val"].shape[1:]) for s in stages]
    assert shapes[0] == (4, 4, 4)  # ReLU and pool go with the convolution before them
    assert shapes[1] == (6, 4, 4)
    assert shapes[-2:] == [(8,), (5,)]


def test_a_dense_block_is_one_stage_until_it_has_too_many_layers():
    whole = cut_stages(family("dense").graph)
    assert layers_of(whole) == [["stem"], [f"block.{i}.conv" for i in range(6)], ["fc"]]
    split = cut_stages(family("dense").graph, max_layers=2)
    pairs = [[f"block.{i}.conv", f"block.{i + 1}.conv"] for i in (0, 2, 4)]
    assert layers_of(split) == [["stem"], *pairs, ["fc"]]
    # every earlier layer's output is still read inside the dense block
    assert [len(s.inputs) for s in split] == [1, 1, 3, 5, 1]
    assert [len(s.outputs) for s in split] == [1, 3, 5, 1, 1]
    assert len({s.name for s in split}) == 5


def test_pieces_of_a_split_are_of_about_equal_size():
    stages = cut_stages(family("dense").graph, max_layers=4)
    assert [len(s.layers) for s in stages] == [1, 3, 3, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_granularity_has_one_layer_a_stage(name):
    stages = cut_stages(family(name).graph, granularity="layer")
    assert {len(s.layers) for s in stages} == {1}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_stages_are_a_chain_that_holds_every_operator_once(name, options):
    graph = family(name).graph
    stages = cut_stages(graph, **options)
    order = [n for n in graph.nodes if n.op == "call_function" and is_activation(n)]
    assert [n for s in stages for n in s.nodes] == order
    for before, after in pairwise(stages):
        assert before.outputs == after.inputs
    assert [n.op for n in stages[0].inputs] == ["placeholder"]
    assert stages[-1].outputs == tuple(next(n for n in graph.nodes if n.op == "output").all_input_nodes)
    for stage in stages:
        known = {*stage.inputs, *stage.nodes}
        assert all(a in known for n in stage.nodes for a in n.all_input_nodes if is_activation(a))
    limit = options.get("max_layers", 16)
    assert all(len(s.layers) <= limit for s in stages)
    assert len({s.name for s in stages}) == len(stages)


def test_first_and_last_layers_stand_alone():
    for name in FAMILIES:
        stages = cut_stages(family(name).graph)
        assert [len(stages[0].layers), len(stages[-1].layers)] == [1, 1], name


class Chain(nn.Module):
    """Convolutions held by one module per block, without any shortcut."""

    def __init__(self, blocks, layers):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(layers))) for _ in range(blocks))
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


def test_a_module_with_a_few_layers_is_a_block_and_one_with_many_is_not():
    assert [len(s.layers) for s in cut(Chain(3, 2))] == [1, 2, 2, 2, 1]
    assert [len(s.layers) for s in cut(Chain(2, 7))] == [1] * 16


class Branches(nn.Module):
    """An Inception-like block, two heads' worth of parallel branches and a pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b1, self.b2 = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(
            torch.cat([self.a(x), self.b2(self.b1(x)), F.max_pool2d(x, 3, 1, 1)], 1).mean([2, 3])
        )


class Windows(nn.Module):
    """A residual whose branch works on windows, which no cut can pass, and then on whole images."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide, self.narrow, self.head = nn.Linear(512, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = x.permute(0, 2, 3, 1).reshape(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        y = self.other(F.relu(self.one(y))).reshape(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5)
        y = self.narrow(F.relu(self.wide(y.reshape(-1, 512))))
        return self.head(F.relu(x.mean((2, 3)) + y))


@pytest.mark.parametrize("options", [{"granularity": "layer"}, {"max_layers": 1}, {"max_layers": 2}])
def test_every_piece_of_a_split_block_has_a_layer(options):
    assert all(stage.layers for stage in cut(Windows(), **options))


def test_parallel_branches_are_one_block():
    assert layers_of(cut(Branches())) == [["stem"], ["a", "b1", "b2"], ["head"]]


def test_affine_batch_norms_are_no_layers_of_their_own():
    stages = cut_stages(family("dense").graph, max_layers=2)
    convolutions = sum(n.op == "call_function" and role(n) is Role.WEIGHTED for s in stages for n in s.nodes)
    assert convolutions == 14
    assert sum(len(s.layers) for s in stages) == 8


def test_cost_of_a_stage():
    stages = cut_stages(family("vgg").graph)
    # output positions × output channels × input channels × kernel
    assert [stage_macs(s) for s in stages] == [64 * 4 * 3 * 9, 16 * 6 * 4 * 9, 16 * 6 * 6 * 9, 24 * 8, 8 * 5]
    assert [value_bytes(s.inputs[0]) for s in stages] == [4 * n for n in (192, 64, 96, 24, 8)]
    depthwise = cut_stages(family("mobile").graph)[1]
    assert stage_macs(depthwise) == 64 * (4 * 8 + 8 * 9 + 8 * 6)


def test_cost_of_a_linear_layer_on_tokens_counts_every_token():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.head(F.relu(self.inner(x.flatten(2).transpose(1, 2))).mean(1))

    assert [stage_macs(s) for s in cut(Tokens())] == [64 * 3 * 7, 7 * 2]


class Nested(nn.Module):
    """Blocks without shortcuts whose children hold one or two layers each."""

    def __init__(self, *children):
        super().__init__()
        blocks = [nn.Sequential(*(convolutions(n) for n in children)) for _ in range(2)]
        self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 1), nn.Sequential(*blocks), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


def convolutions(count):
    return nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(count)))


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        ((1, 1), [1, 2, 2, 1]),
        ((2, 1), [1, 3, 3, 1]),  # one part of several layers is part of the block
        ((2, 2), [1, 2, 2, 2, 2, 1]),  # two of them are blocks of their own
    ],
)
def test_a_module_that_contains_several_blocks_is_not_one(children, expected):
    assert [len(s.layers) for s in cut(Nested(*children))] == expected
