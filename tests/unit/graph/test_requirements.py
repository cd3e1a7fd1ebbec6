"""What cannot be quantized is refused in one line that names the user's own, with a hint that helps."""

from pathlib import Path

import pytest
import torch
from networks import SIZE, images, trained
from torch import nn
from torch.nn import functional as F

from metaaug_cli.errors import GraphError, InputError
from metaaug_cli.graph.capture import capture, capture_unfolded
from metaaug_cli.graph.requirements import line_in_text


class Net(nn.Module):
    """A convolution and a linear layer around whatever ``body`` does."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.head, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5), body

    def forward(self, x):
        return self.head(self.body(self.conv(x)).mean([2, 3]))


def line_with(text):
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(source, 1) if line.endswith(f"# {text}")]
    return f"{__file__}:{number}"


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1  # the write to a counter
        return x


class Averages(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        self.average.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)  # the write to an average
        return x - self.average[:, None, None]


class TrainedCounts(Counts):
    def forward(self, x):
        return super().forward(x) if self.training else x


class FrozenNoise(nn.Module):
    def forward(self, x):
        return x + torch.randn(4, 1, 1)  # the draw without a batch


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)  # the draw for each image


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)  # the dropout that never stops


@pytest.mark.parametrize("captured", [capture, capture_unfolded])
@pytest.mark.parametrize(
    ("body", "said", "line", "hint"),
    [
        (Counts, "changes its buffer `body.count`", "the write to a counter", "if self.training"),
        (Averages, "changes its buffer `body.average`", "the write to an average", "if self.training"),
        (FrozenNoise, "random numbers (aten.randn.default)", "the draw without a batch", "in a buffer"),
        (Noise, "random numbers (aten.rand_like.default)", "the draw for each image", "in a buffer"),
        (AlwaysDrops, "random numbers", "the dropout that never stops", "training=self.training"),
    ],
)
def test_state_and_chance_are_refused_with_their_line(captured, body, said, line, hint):
    with pytest.raises(GraphError) as caught:
        captured(trained(Net(body())), SIZE)
    assert said in caught.value.message
    assert line_with(line) in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "body", [TrainedCounts, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU]
)
def test_what_happens_in_training_alone_is_no_matter(body):
    network = trained(Net(body()))
    module, x = capture(network, SIZE), images(3)
    torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)


def test_attention_without_dropout_draws_nothing():
    class Attention(nn.Module):
        def forward(self, x):
            rows = x.flatten(2)
            return F.scaled_dot_product_attention(rows, rows, rows).view_as(x)

    network = trained(Net(Attention()))
    module, x = capture(network, SIZE), images(3)
    torch.testing.assert_close(module(x), network(x), rtol=1e-5, atol=1e-5)


def test_a_part_of_torchs_own_is_named_by_its_module():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.FractionalMaxPool2d(2, output_size=4)).eval()
    with pytest.raises(GraphError, match=r"random numbers .*, in module `1`$"):
        capture(network, SIZE)


def exported(network, example, batch):
    return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def test_batches_of_some_sizes_only_are_refused():
    program = exported(trained(Net(nn.ReLU())), images(4), 2 * torch.export.Dim("half"))
    with pytest.raises(GraphError, match=r"takes batches of 2\*batch images") as caught:
        capture(program, SIZE)
    assert "dynamic_shapes" in caught.value.hint


class ChannelsLast(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.permute(0, 3, 1, 2))


class ChannelsFirst(ChannelsLast):
    """What the hint says."""

    def forward(self, x):
        return self.network(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("input_size", [SIZE, (3, 8, 3)])  # as given, and as read from the program
def test_channels_last_are_refused_with_a_hint_that_works(input_size):
    network = trained(Net(nn.ReLU()))
    program = exported(ChannelsLast(network), images(2).permute(0, 2, 3, 1), torch.export.Dim("batch"))
    with pytest.raises(GraphError, match=r"channels last, \(8, 8, 3\)") as caught:
        capture(program, input_size)
    assert "x.permute(0, 2, 3, 1)" in caught.value.hint
    again = exported(ChannelsFirst(ChannelsLast(network)), images(2), torch.export.Dim("batch"))
    x = images(3)
    torch.testing.assert_close(capture(again, SIZE)(x), network(x), rtol=1e-5, atol=1e-5)


def test_another_size_is_not_taken_for_channels_last():
    program = exported(trained(Net(nn.ReLU())), images(2, (3, 6, 3)), torch.export.Dim("batch"))
    with pytest.raises(InputError, match=r"images of \(3, 6, 3\)"):
        capture(program, SIZE)


def test_the_users_line_in_a_printed_trace():
    frame = '  File "{}", line {}, in forward\n    return f(x)\n'
    text = frame.format("/a/net.py", 3) + frame.format("/b/torch/nn/modules.py", 9)
    assert line_in_text(text) == "/a/net.py:3 (return f(x))"
    assert line_in_text('File "/a/net.py", line 3\nFile "/a/other.py", line 4') == "/a/other.py:4"
    assert line_in_text(text.replace("/a/", "/torch/")) is None
