"""Capture keeps the function of the user's network, whatever its forward is written with."""

import logging
from pathlib import Path

import pytest
import torch
from networks import FAMILIES, SIZE, family, images, targets, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.errors import GraphError, InputError
from metaaug_cli.graph.capture import capture, export_program
from metaaug_cli.graph.ops import is_activation


class Net(nn.Module):
    """A convolution and a linear layer around whatever ``body`` does."""

    def __init__(self, body):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.body = body

    def forward(self, x):
        return self.head(self.body(self.conv(x)).mean([2, 3]))


class InPlace(nn.Module):
    def forward(self, x):
        y = x.clone()
        y += 1.5
        F.relu_(y)
        y.mul_(2.0)
        return y


class Constants(nn.Module):
    """A buffer, a literal tensor and arithmetic between constants."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(4.0))
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return x * (torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.gain * self.table).view(1, 4, 1, 1)


class ShapeControl(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2) if x.shape[-1] > 4 else x


class Tokens(nn.Module):
    """Linear layers on (N, T, C), a class token and a norm, as transformers have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.outer = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        n = x.shape[0]
        tokens = torch.cat([self.token.expand(n, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self.outer(F.gelu(self.inner(self.norm(tokens))))
        return tokens[:, 1:].transpose(1, 2).reshape(n, 4, 8, 8)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


BODIES = {
    "functional add": lambda: Call(lambda x: torch.add(F.relu(x), x, alpha=2)),
    "in-place operators": InPlace,
    "chunk": lambda: Call(lambda x: torch.cat(torch.chunk(x, 2, dim=1)[::-1], 1)),
    "uneven split": lambda: Call(lambda x: torch.cat(torch.split(x, [1, 3], dim=1)[::-1], 1)),
    "unbind": lambda: Call(lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    "padding": lambda: Call(lambda x: F.pad(x, (1, 2, 0, 1))),
    "padding with ones": lambda: Call(lambda x: F.pad(x, (1, 2, 0, 1), value=1.0)),
    "reflected padding": lambda: Call(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    "same, odd kernel": lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2),
    "same, even kernel": lambda: nn.Conv2d(4, 4, (2, 4), padding="same"),
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid", stride=2),
    "silu": nn.SiLU,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.9), nn.Dropout2d(0.9)),
    "constants": Constants,
    "control flow on shapes": ShapeControl,
    "tokens": Tokens,
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(4),
    "ragged adaptive pool": lambda: nn.AdaptiveAvgPool2d(3),
    "max pool and interpolation": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
    "batch norm alone": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_the_captured_network_computes_the_same(body):
    network = trained(Net(body()))
    module = capture(network, SIZE)
    for count in (1, 3):  # the batch size is free
        x = images(count)
        with torch.no_grad():
            torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-4)
    assert float(network(images(8)).std(0).min().detach()) > 1e-3, "the outputs do not depend on the images"


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_networks_compute_the_same(name):
    network, module = trained(FAMILIES[name]()), family(name)
    with torch.no_grad():
        expected = network(images(5))
        torch.testing.assert_close(
            module(images(5)), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_the_graph_has_one_image_in_one_tensor_out_and_no_module_calls():
    module = family("mixed")
    nodes = list(module.graph.nodes)
    assert [n.op for n in nodes if n.op not in ("get_attr", "call_function")] == ["placeholder", "output"]
    assert all(is_activation(n) for n in nodes if n.op == "call_function")
    assert isinstance(nodes[-1].args[0], torch.fx.Node)


def test_buffers_keep_the_users_names_and_unused_ones_go():
    network = trained(Net(BODIES["batch norm alone"]()))
    network.register_buffer("unused", torch.ones(3))
    names = {name for name, _ in capture(network, SIZE).named_buffers()}
    assert {"conv.weight", "conv.bias", "head.weight", "head.bias"} <= names
    assert not any("unused" in name or "running" in name for name in names)


def test_the_users_network_is_not_changed():
    network = trained(FAMILIES["residual"]())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = network(images(2)).detach()
    capture(network, SIZE)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(network(images(2)), expected)


def test_capture_twice_gives_the_same_graph():
    first, second = (capture(trained(Net(Tokens())), SIZE) for _ in range(2))
    assert first.code == second.code
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_a_program_gives_the_same_network_as_its_module(tmp_path):
    network = trained(Net(nn.Sequential(nn.Dropout(), nn.BatchNorm2d(4), nn.ReLU6())))
    path = tmp_path / "net.pt2"
    torch.export.save(export_program(network, SIZE), path)
    module = capture(torch.export.load(path), SIZE)
    with torch.no_grad():
        torch.testing.assert_close(module(images(3)), network(images(3)), rtol=1e-4, atol=1e-5)
    assert targets(module) == targets(capture(network, SIZE))


def line_with(text):
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(source, 1) if line.endswith(f"# {text}")]
    return number


class DependsOnValues(nn.Module):
    def forward(self, x):
        if x.mean() > 0:  # the line that cannot be traced
            return x
        return -x


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("boom")  # the line that fails


@pytest.mark.parametrize(
    ("body", "error", "line", "hint"),
    [
        (DependsOnValues, GraphError, "the line that cannot be traced", ".pt2"),
        (Raises, InputError, "the line that fails", "--size"),
    ],
)
def test_a_network_that_fails_names_the_users_line(body, error, line, hint, capfd):
    with pytest.raises(error, match=r"cannot be traced|does not run on images of") as caught:
        capture(Net(body()), SIZE)
    assert f"{__file__}:{line_with(line)}" in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in caught.value.hint
    assert capfd.readouterr() == ("", ""), "torch's own printing reaches the terminal"


def test_a_fixed_batch_in_the_code_is_named():
    with pytest.raises(GraphError, match="works for batches of 2 images only") as caught:
        capture(Net(Call(lambda x: x.view(2, 4, 8, 8))), SIZE)
    assert "no fixed batch in view/reshape" in caught.value.hint


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x + 1


def test_several_inputs_are_refused():
    with pytest.raises(GraphError, match="takes 2 inputs") as caught:
        capture(TwoInputs(), SIZE)
    assert "wrap the network" in caught.value.hint
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        TwoInputs(), (images(2), images(2)), dynamic_shapes=({0: batch}, {0: batch})
    )
    with pytest.raises(GraphError, match="takes 2 inputs"):
        capture(program, SIZE)


def test_several_outputs_are_refused():
    with pytest.raises(GraphError, match="returns 2 values") as caught:
        capture(TwoOutputs(), SIZE)
    assert "logits only" in caught.value.hint


def test_a_program_with_a_fixed_batch_is_refused():
    program = torch.export.export(trained(Net(nn.ReLU())), (images(4),))
    with pytest.raises(GraphError, match="fixes its batch size to 4") as caught:
        capture(program, SIZE)
    assert "dynamic_shapes" in caught.value.hint


def test_a_program_of_another_image_size_is_refused():
    program = export_program(trained(Net(nn.ReLU())), (3, 16, 16))
    with pytest.raises(InputError, match=r"\(3, 16, 16\).*\(3, 8, 8\)") as caught:
        capture(program, SIZE)
    assert "--size 16;" in caught.value.hint
    oblong = export_program(trained(Net(nn.ReLU())), (3, 8, 16))
    with pytest.raises(InputError) as caught:
        capture(oblong, SIZE)
    assert "--size 8x16;" in caught.value.hint


class OwnStatistics(nn.Module):
    """Normalises by the batch whatever mode it is in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=True)


def test_a_batch_norm_without_statistics_is_refused():
    network = Net(nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(GraphError, match="stores no statistics") as caught:
        capture(network, images(1).shape[1:])
    assert "track_running_stats=True" in caught.value.hint


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4), OwnStatistics])
def test_a_program_in_training_mode_is_refused(norm):
    network = Net(nn.Sequential(nn.Dropout(), norm()))
    batch = torch.export.Dim("batch")
    program = torch.export.export(network.train(), (images(2),), dynamic_shapes=({0: batch},))
    with pytest.raises(GraphError, match=r"training mode: its batch norm `body\.1`") as caught:
        capture(program, SIZE)
    assert "model.eval() before torch.export.export" in caught.value.hint


class Taken(nn.Module):
    """Its parts are called what torch's graph modules call their own attributes."""

    def __init__(self):
        super().__init__()
        self.code = nn.Conv2d(3, 4, 3)
        self.graph = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.recompile = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shape_env", torch.ones(4, 1, 1), persistent=False)
        self.meta = nn.Linear(4, 5)

    def forward(self, x):
        x = self.graph(self.code(x)) * self.recompile + self.shape_env
        return self.meta(F.relu(x).mean([2, 3]))


def test_names_that_torch_takes_for_itself(tmp_path):
    network = trained(Taken())
    path = tmp_path / "net.pt2"
    program = torch.export.export(network, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    x, names = images(3), sorted(program.state_dict)
    for source in (network, program, torch.export.load(path), export_program(network, SIZE)):
        module = capture(source, SIZE)
        torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)
        layers = {name.partition(".")[0] for name, _ in module.named_buffers()}
        assert layers == {"code_", "graph_", "recompile_", "shape_env_", "meta_"}
        owners = {n.meta["owner"] for n in module.graph.nodes if n.op == "call_function"}
        assert owners == {"code_", "graph_.1", "graph_.2", "", "meta_"}
    assert sorted(program.state_dict) == names, "the user's program is changed"


def test_two_names_that_would_be_one_are_refused():
    network = nn.Sequential()
    network.code, network.code_ = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
    with pytest.raises(GraphError, match=r"both `code\.(weight|bias)` and `code_\.\1`") as caught:
        capture(network, SIZE)
    assert "rename `code`" in caught.value.hint


class SortedValues(nn.Module):
    def forward(self, x):
        return torch.topk(x, 4, dim=1).values


def test_an_operator_with_several_results_is_refused_with_its_line():
    with pytest.raises(GraphError, match="several values") as caught:
        capture(Net(SortedValues()), SIZE)
    assert "torch.topk(x, 4, dim=1)" in caught.value.message


def test_torchs_settings_are_restored():
    before = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("torch").level
    with pytest.raises(InputError):
        capture(Raises(), SIZE)
    capture(trained(Net(nn.ReLU())), SIZE)
    assert (torch.backends.mha.get_fastpath_enabled(), logging.getLogger("torch").level) == before
