"""A small residual network for 8x8 grey digits: the model of ``metaaug demo``.

It has what makes quantization interesting in a few thousand weights: batch norms, residual
additions, a depthwise convolution and a strided one. It also shows what ``FILE.py:FACTORY`` expects:
a function that takes no arguments and returns the network, whose weights come from ``--weights``.
"""

from torch import Tensor, nn
from torch.nn.functional import relu


def conv_bn(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (divided by ``stride``), followed by batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels, 3)
        self.second = conv_bn(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.second(relu(self.first(x))))


class Separable(nn.Module):
    """A strided depthwise convolution, then a 1x1 convolution that mixes the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = conv_bn(inputs, inputs, 3, stride=2, groups=inputs)
        self.pointwise = conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.pointwise(relu(self.depthwise(x))))


class DigitsCNN(nn.Module):
    """(N, 1, 8, 8) normalised images to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3)
        self.body = nn.Sequential(
            Residual(16), Separable(16, 32), Residual(32), Separable(32, 48), Residual(48)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(relu(self.stem(x)))
        return self.head(self.pool(x).flatten(1))


def digits_cnn() -> nn.Module:
    """The network with random weights."""
    return DigitsCNN()
