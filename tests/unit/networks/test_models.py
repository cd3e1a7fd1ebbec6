"""Models load from every source with their own preprocessing; factories are checked."""

import textwrap

import pytest
import torch
import user_code
from safetensors.torch import save_file
from user_code import FLAGS

from metaaug_cli.calibration.data import iter_labelled_batches, scan_folder
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.models import load_model
from metaaug_cli.networks.weights import hash_state


def test_factory_with_weights(network_file, state, tmp_path):
    save_file(state, tmp_path / "net.safetensors")
    loaded = user_code.load(network_file, tmp_path / "net.safetensors", interpolation="bicubic")
    assert loaded.name == "network.build"
    assert loaded.weights == "net.safetensors"
    assert not loaded.module.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in loaded.module.parameters())
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    assert loaded.weights_sha256 == hash_state(state)
    assert loaded.preprocessing.to_dict() == {
        "size": [8, 8],
        "resize": "auto",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    }


def test_untrained_factory_must_be_asked_for(network_file):
    with pytest.raises(UsageError, match="randomly initialised") as caught:
        user_code.load(network_file, None)
    assert "--weights FILE" in caught.value.hint
    random = user_code.load(network_file, "random")
    assert random.weights == "random (--weights random)"
    assert random.weights_sha256 == user_code.load(network_file, "random").weights_sha256


def test_factory_with_its_own_weights(network_file):
    loaded = load_model(f"{network_file}:trained", **FLAGS)
    assert loaded.weights == "own weights of network.py:trained"
    assert loaded.module.fc.bias.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("{}:bild", "defines no factory 'bild'", "offers: build"),
        ("{}", "needs the name of a factory", "Net, build, trained"),
        ("{}:broken", r"calling broken\(\).*raised RuntimeError \(line 25\)", None),
        ("{}:needy", "raised TypeError", "without arguments"),
        ("{}:wrong", "returned dict, not a torch.nn.Module", "network alone"),
        ("absent.py:build", "no Python file", "FILE.py:FACTORY"),
        ("resnet81", "no image classifier named 'resnet81'", "resnet18"),
        ("net.pth", "holds weights, not a network", "--weights net.pth"),
        ("net.onnx", "MODEL is a PyTorch network", "FILE.py:FACTORY"),
        ("timm:resnt18", "timm has no model", "timm:resnet18"),
    ],
)
def test_wrong_specs_say_what_to_do(network_file, spec, message, hint):
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(InputError, match=message) as caught:
        load_model(spec.format(network_file), weights="random", **FLAGS)
    if hint is not None:
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:\n", r"raised SyntaxError \(line 1\)"),
        ("x = 1\nimport no_such_thing\n", r"ModuleNotFoundError \(line 2\)"),
        ("import sys\nsys.exit(3)\n", "raised SystemExit"),
    ],
)
def test_files_that_do_not_import(tmp_path, text, message):
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(InputError, match=message):
        load_model(f"{tmp_path / 'net.py'}:build", **FLAGS)


@pytest.mark.filterwarnings("ignore")  # of torch itself, about TorchScript
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.to('meta')", "built without values"),
        ("network.register_buffer('kept', torch.eye(3).to_sparse())", "holds sparse weights: kept"),
        ("network = torch.jit.script(network)", r"build\(\) of .* holds TorchScript, which"),
        ("network.append(torch.jit.script(torch.nn.ReLU()))", r"holds TorchScript \(1\)"),
        ("network.append(torch.nn.LazyBatchNorm2d())", r"holds a lazy layer without a shape \(1\)"),
    ],
)
def test_networks_without_ordinary_weights_are_refused(tmp_path, change, message):
    text = f"""
        import torch

        def build():
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))
            {change}
            return network
    """
    (tmp_path / "net.py").write_text(textwrap.dedent(text))
    with pytest.raises(InputError, match=message):
        load_model(f"{tmp_path / 'net.py'}:build", weights="random", **FLAGS)


@pytest.mark.parametrize("wrap", ["torch.compile({})", "torch.nn.DataParallel(torch.compile({}))"])
def test_the_network_is_taken_out_of_what_wraps_it(tmp_path, wrap):
    plain = "torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))"
    for name, text in (("plain", plain), ("wrapped", wrap.format(plain))):
        (tmp_path / f"{name}.py").write_text(f"import torch\ndef build():\n    return {text}\n")
    found, wanted = (
        load_model(f"{tmp_path / name}.py:build", weights="random", **FLAGS) for name in ("wrapped", "plain")
    )
    assert type(found.module) is torch.nn.Sequential
    assert found.weights_sha256 == wanted.weights_sha256


def test_extra_state_of_a_module_is_its_own_business(tmp_path):
    text = """
        import torch

        class Noted(torch.nn.Conv2d):
            def get_extra_state(self):
                return {"note": "mine"}

            def set_extra_state(self, state):
                assert state == {"note": "mine"}

        def build():
            return torch.nn.Sequential(Noted(3, 2, 3))
    """
    (tmp_path / "net.py").write_text(textwrap.dedent(text))
    spec = f"{tmp_path / 'net.py'}:build"
    network = load_model(spec, weights="random", **FLAGS).module
    torch.save(network.state_dict(), tmp_path / "net.pt")
    assert load_model(spec, weights=tmp_path / "net.pt", **FLAGS).weights == "net.pt"


def test_a_factory_may_import_its_neighbours(network_file):
    (network_file.parent / "other.py").write_text("from network import trained as build\n")
    assert load_model(f"{network_file.parent / 'other.py'}:build", **FLAGS).module.fc.bias[0] == 0.5


@pytest.mark.parametrize("missing", ["size", "mean", "std"])
def test_normalisation_is_never_guessed(network_file, missing):
    flags = {k: v for k, v in FLAGS.items() if k != missing}
    with pytest.raises(UsageError, match=f"--{missing} missing"):
        load_model(f"{network_file}:trained", **flags)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "resnet18",
            "224x224 RGB centre crop, resize 256 bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225",
        ),
        ("efficientnet_b0", "224x224 RGB centre crop, resize 256 bicubic, mean 0.485 0.456 0.406"),
        ("inception_v3", "299x299 RGB centre crop, resize 342 bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"),
    ],
)
def test_torchvision_preprocessing(name, line):
    loaded = load_model(name, weights="random")
    assert loaded.preprocessing.describe().startswith(line)
    assert loaded.weights == "random (--weights random)"


def test_flags_override_the_models_own_preprocessing():
    own = load_model("squeezenet1_1", weights="random", size=112).preprocessing
    assert (own.size, own.resize) == ((112, 112), 128)
    never = load_model("squeezenet1_1", weights="random", resize=None, std=(1.0,) * 3).preprocessing
    assert (never.resize, never.std, never.mean[0]) == (None, (1.0, 1.0, 1.0), 0.485)


def test_transform_inside_googlenet_moves_into_the_preprocessing(tmp_path):
    """torchvision re-normalises inside the published network; both routes give the same logits."""
    from torchvision import models

    published = models.googlenet(
        weights=None, init_weights=False, aux_logits=True, transform_input=True
    ).eval()
    torch.save(published.state_dict(), tmp_path / "googlenet.pth")
    loaded = load_model("googlenet", weights=tmp_path / "googlenet.pth", size=96)
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    imagenet = load_model("resnet18", weights="random").preprocessing
    with torch.no_grad():
        expected = published(imagenet.normalise(pixels))
        found = loaded.module(loaded.preprocessing.normalise(pixels))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "weights", "data", "size", "mean", "std", "correct"),
    [
        (
            "cifar_resnet.py:resnet20", "cifar_resnet20", "cifar10/test", 32,
            (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4422,
        ),
        (
            "mobilenet_v1.py:mobilenet_v1_075", "mobilenet_v1_075", "imagenet/val", 224,
            (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 499,
        ),
    ],
    ids=["resnet20", "mobilenet_v1"],
)  # fmt: skip
def test_published_accuracy_of_real_models(shared, spec, weights, data, size, mean, std, correct):
    file = shared / "models" / f"{weights}.safetensors"
    loaded = load_model(f"{shared}/models/{spec}", weights=file, size=size, mean=mean, std=std)
    folder = scan_folder(
        shared / "data" / data, classes_file=shared / "data" / data.split("/")[0] / "classes.txt"
    )
    found = 0
    with torch.no_grad():
        for images, labels in iter_labelled_batches(folder, loaded.preprocessing):
            found += int((loaded.module(images).argmax(1) == labels).sum())
    assert abs(found - correct) <= 1  # another CPU may round one borderline image differently
