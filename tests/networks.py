"""Small networks that the tests capture, cut and quantize: one of each shape that networks come in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaaug_cli.deployment.deploy import deploy
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits, Placement, place
from metaaug_cli.quantization.blocks import Chain, build_chain, search_activation_scales

SIZE = (3, 8, 8)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """The basic block of ResNet; the shortcut has a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_bn(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.first(x)))
        y += self.shortcut(x)
        return self.relu(y)


class ResidualNet(nn.Module):
    """A CIFAR-like residual network with three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.layer1 = nn.Sequential(Residual(6, 6), Residual(6, 8, 2))
        self.layer2 = nn.Sequential(Residual(8, 8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.stem(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (MobileNetV2), with a shortcut where the shape allows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = 2 * inputs
        self.conv = nn.Sequential(
            conv_bn(inputs, wide, 1),
            nn.ReLU6(inplace=True),
            conv_bn(wide, wide, groups=wide),
            nn.ReLU6(inplace=True),
            conv_bn(wide, outputs, 1),
        )
        self.has_shortcut = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*conv_bn(3, 4), nn.ReLU6()),
            InvertedResidual(4, 6),
            InvertedResidual(6, 6),
            InvertedResidual(6, 4),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Vgg(nn.Module):
    """A chain of single layers in one Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, *features: Tensor) -> Tensor:
        return self.conv(torch.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """One dense block: every layer reads the outputs of all before it (pre-activation)."""

    def __init__(self, layers: int = 6, growth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.ModuleList(DenseLayer(4 + growth * i, growth) for i in range(layers))
        self.fc = nn.Linear(4 + growth * layers, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block:
            features.append(layer(*features))
        return self.fc(torch.relu(torch.cat(features, 1)).mean([2, 3]))


class Mixed(nn.Module):
    """What else an integer graph must handle: chunks, gates, padding, SiLU, average pools, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.left = nn.Conv2d(4, 4, 3, stride=2)
        self.right = nn.Conv2d(4, 4, 1, groups=2)
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 5)
        self.register_buffer("offset", torch.linspace(-0.5, 0.5, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = nn.functional.silu(self.stem(x)).chunk(2, dim=1)
        a = nn.functional.relu(self.left(nn.functional.pad(a, (0, 1, 0, 1))))
        b = nn.functional.avg_pool2d(self.right(b), 2)
        b = b * torch.sigmoid(self.gate(a))
        return self.head(nn.functional.adaptive_avg_pool2d(torch.cat([a, b], 1) + self.offset, 1).flatten(1))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "residual": ResidualNet,
    "mobile": MobileNet,
    "vgg": Vgg,
    "dense": DenseNet,
    "mixed": Mixed,
}


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with batch norms whose statistics and affine part are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        gain = (2.0 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * gain
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            shape = module.running_mean.shape
            module.running_mean = torch.randn(shape, generator=generator) * 0.3
            module.running_var = torch.rand(shape, generator=generator) + 0.3
            module.weight.data = torch.rand(shape, generator=generator) + 0.5
    return network.eval()


def images(count: int, size: tuple[int, int, int] = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


_captured: dict[str, torch.fx.GraphModule] = {}


def family(name: str) -> torch.fx.GraphModule:
    """One of ``FAMILIES`` captured; the module is shared by all tests and not to be changed."""
    if name not in _captured:
        _captured[name] = capture(trained(FAMILIES[name]()), SIZE)
    return _captured[name]


def placed(
    module: torch.fx.GraphModule, kind: str = "integer", *, bits: Bits | None = None, **options
) -> Placement:
    return place(module.graph, kind=kind, bits=bits or Bits(weight=4, act=4), **options)


def searched(
    module: torch.fx.GraphModule,
    bits: Bits | None = None,
    kind: str = "academic",
    calibration: Tensor | None = None,
) -> Chain:
    """The chain of a network with every scale searched, on 16 images if no others are given."""
    chain = build_chain(module, placed(module, kind, bits=bits or Bits(2, 2)))
    values: tuple[Tensor, ...] = (images(16) if calibration is None else calibration,)
    with torch.no_grad():
        for block in chain.blocks:
            search_activation_scales(block, values)
            values = block.quantized_block(*values)
    return chain


def deployed(network: nn.Module, calibration: Tensor, bits: Bits) -> torch.fx.GraphModule:
    """A network with searched scales, every tensor on integers."""
    module = capture(network, tuple(calibration.shape[1:]))
    return deploy(searched(module, bits, "integer", calibration))


def targets(module: torch.fx.GraphModule) -> list[str]:
    """Names of the operators a graph calls, in order, without overload."""
    return [str(n.target).split(".")[1] for n in module.graph.nodes if n.op == "call_function"]


def labels(graph: torch.fx.Graph) -> dict[torch.fx.Node, str]:
    """Operator and occurrence of each node ("relu", "relu_1"); fx's names differ between torch versions."""
    found: dict[torch.fx.Node, str] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        name = str(node.target).split(".")[1] if node.op == "call_function" else node.op
        found[node] = f"{name}_{counts[name]}" if name in counts else name
        counts[name] = counts.get(name, 0) + 1
    return found
