"""Sets that suit pass; each way of not suiting is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from metaaug_cli.calibration import check_page
from metaaug_cli.calibration.check import DISTANCE_LIMIT, check_calibration_set
from metaaug_cli.calibration.data import load_calibration_set, make_calibration_set
from metaaug_cli.graph.bn_statistics import batch_norm_probe
from metaaug_cli.networks.models import load_model
from metaaug_cli.networks.preprocessing import Preprocessing

SIZE = 12
PREPROCESSING = Preprocessing(
    (SIZE, SIZE), None, "bilinear", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
)


def photographs(count, seed):
    """Smooth pictures, reddish and light above, bluish and dark below, as [0, 1] pixels."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, 4, 4, generator=generator)
    cast = torch.tensor([0.15, 0.05, -0.2]).view(3, 1, 1)
    light = torch.linspace(0.1, -0.1, SIZE).view(1, SIZE, 1)
    pixels = interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return (pixels + cast + light + 0.02 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, 8), (8, 8), (8, 8), (8, 8), (8, 8)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs, momentum=None),
            ]
            layers += [nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def remembering(network, pixels, preprocessing=PREPROCESSING):
    """The network with batch norms that have seen these pixels."""
    with torch.no_grad():
        network.train()(normalised(pixels, preprocessing))
        return network.eval()


def normalised(pixels, preprocessing=PREPROCESSING):
    return preprocessing.normalise(pixels.mul(255).round())


@pytest.fixture(scope="module")
def probe():
    torch.manual_seed(0)
    return batch_norm_probe(remembering(Net(2), photographs(600, 0)), (3, SIZE, SIZE))


def judged(probe, pixels, preprocessing=PREPROCESSING, **options):
    made = make_calibration_set(normalised(pixels, preprocessing), preprocessing, ["x"] * len(pixels))
    return check_calibration_set(made, probe, **options)


@pytest.mark.parametrize("count", [32, 128])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_images_like_the_training_images_suit(probe, count, seed):
    check = judged(probe, photographs(count, seed), model="net")
    assert check.suits
    assert check.findings == ()
    assert check.distance < 0.1
    assert check.sentence.startswith(f"These {count} images suit net: ")
    assert [layer.name for layer in check.layers] == [f"body.{i}" for i in range(1, 15, 3)]
    assert check.classes is None  # two outputs are too few to judge by


def test_swapped_channels_are_named(probe):
    check = judged(probe, photographs(64, 1).flip(1))
    assert not check.suits
    assert check.findings[0].name == "bgr"
    assert "they look like BGR where the model expects RGB" in check.sentence
    assert check.advice[0].startswith("swap red and blue")


@pytest.mark.parametrize("std", [(0.229, 0.224, 0.225), (1.0, 1.0, 1.0), (1 / 255, 1 / 255, 1 / 255)])
def test_a_wrong_normalisation_is_named_with_the_right_one(probe, std):
    mean = (0.0, 0.0, 0.0) if std[0] != 0.229 else (0.485, 0.456, 0.406)
    check = judged(probe, photographs(256, 1), replace(PREPROCESSING, mean=mean, std=std))
    assert check.findings[0].kind == "preparation"
    assert check.findings[0].remedy == "pass --mean 0.4914,0.4822,0.4465 --std 0.247,0.2435,0.2616"


def test_unscaled_images_in_a_set_are_named(probe):
    made = make_calibration_set(photographs(32, 1) * 255, PREPROCESSING, ["x"] * 32)
    check = check_calibration_set(made, probe)
    assert "0 to 255 pixels that were never scaled" in check.sentence
    assert any(finding.kind == "domain" for finding in check.findings)
    assert check.advice[1].startswith("also, they ")


def test_grey_images_are_named_for_a_colour_network_only(probe):
    grey = photographs(64, 1).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    check = judged(probe, grey)
    assert check.grey_share == 1.0
    assert check.findings[0].kind == "grey"
    torch.manual_seed(0)
    trained_on_grey = photographs(600, 0).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    other = batch_norm_probe(remembering(Net(2), trained_on_grey), (3, SIZE, SIZE))
    assert judged(other, grey).suits


def test_another_kind_of_images_is_named(probe):
    noise = torch.rand(64, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    check = judged(probe, noise)
    assert check.distance > DISTANCE_LIMIT
    assert "domain" in {finding.kind for finding in check.findings}


def test_another_statement_than_the_models_comes_first(probe):
    check = judged(probe, photographs(32, 1), expected=replace(PREPROCESSING, resize=256))
    assert check.findings[0].kind == "preprocessing"
    assert "resize: none, not 256" in check.sentence


class ByColour(nn.Module):
    """Three classes: which channel is strongest."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=None)

    def forward(self, x):
        return self.norm(x).mean((2, 3))


def test_too_few_classes_are_named():
    pixels = torch.rand(300, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.3
    for index in range(300):
        pixels[index, index % 3] += 0.4
    probe = batch_norm_probe(remembering(ByColour(), pixels), (3, SIZE, SIZE))
    everything, red = judged(probe, pixels[:60]), judged(probe, pixels[::3][:60])
    assert everything.suits
    assert everything.classes == pytest.approx(3.0)
    assert everything.classes_expected == pytest.approx(3.0)
    assert red.classes == pytest.approx(1.0)
    assert "classes" in {finding.kind for finding in red.findings}


def test_only_so_many_images_are_looked_at(probe):
    seen = []
    check = judged(probe, photographs(40, 1), num=32, progress=lambda *state: seen.append(state))
    assert check.images == 32
    assert seen[-1] == (32, 32)


def test_the_page_shows_the_verdict_and_every_layer(probe):
    check = judged(probe, photographs(64, 1).flip(1), model="<net>")
    verdict, distances = check_page.verdict(check), check_page.distances(check)
    assert "Does not suit" in verdict
    assert "&lt;net&gt;" in verdict
    assert verdict.count("<li>") == len(check.findings)
    assert distances.count("<rect") == len(check.layers) == distances.count("<tr>")
    assert f"{check.layers[0].name}: {check.layers[0].distance:.3f}" in distances
    assert "Suits" in check_page.verdict(judged(probe, photographs(64, 1)))


def test_the_verdict_is_plain_data(probe):
    report = judged(probe, photographs(32, 1)).to_dict()
    assert report["suits"] is True
    assert report["limit"] == DISTANCE_LIMIT
    assert report["layers"][0]["name"] == "body.1"


@pytest.mark.slow
def test_real_images_and_what_spoils_them(shared):
    model = load_model(
        f"{shared}/models/cifar_resnet.py:resnet20",
        weights=shared / "models/cifar_resnet20.safetensors",
        size=32,
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
    )
    right = load_calibration_set(shared / "data/cifar10/calib", preprocessing=model.preprocessing, num=256)
    probe = batch_norm_probe(model.module, (3, 32, 32))
    pixels = model.preprocessing.denormalise(right.images)
    assert check_calibration_set(right, probe).suits
    assert judged(probe, pixels.flip(1), model.preprocessing).findings[0].name == "bgr"
    imagenet = replace(model.preprocessing, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert judged(probe, pixels, imagenet).findings[0].remedy.startswith("pass --mean 0.4914")
