"""Weights files of every shape load, without running foreign code, and what does not fit is listed."""

import argparse
import hashlib
import io
import urllib.error
from pathlib import Path

import pytest
import torch
import user_code
from safetensors.torch import save_file
from user_code import Exploit

from metaaug_cli.errors import InputError
from metaaug_cli.networks import weights as weights_module
from metaaug_cli.networks.models import load_model
from metaaug_cli.networks.weights import cached_weights, hash_state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model_state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "best": torch.tensor(0.9)},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {k: v.double() for k, v in s.items()},
        lambda s: {k: v.to_sparse() if v.dim() > 1 else v for k, v in s.items()},
    ],
    ids=["plain", "nested", "module", "compiled", "lightning", "no-counter", "double", "sparse"],
)
def test_checkpoints_of_many_shapes(network_file, state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "net.pth")
    loaded = user_code.load(network_file, tmp_path / "net.pth")
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.dtype in {torch.float32, torch.int64}


def test_what_does_not_fit_is_listed(network_file, state, tmp_path):
    state["fc.weight"] = torch.zeros(10, 6)
    state["head.weight"] = state.pop("conv.bias")
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(InputError) as caught:
        user_code.load(network_file, tmp_path / "net.pt")
    assert caught.value.message.splitlines()[1:] == [
        "  1 missing: conv.bias",
        "  1 unexpected: head.weight",
        "  1 mis-shaped: fc.weight: file 10x6, network 4x6",
    ]


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(network_file, tmp_path):
    marker = tmp_path / "owned"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Exploit(marker)}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"without executing code: it holds a \w+\.mkdir") as caught:
        user_code.load(network_file, tmp_path / "bad.pth")
    assert "state_dict()" in caught.value.hint
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "no weights file"),
        ("bad.pt", b"garbage", "cannot be loaded|damaged"),
        ("bad.safetensors", b"garbage", "not a readable safetensors"),
        ("weights.h5", b"x", "not a weights file that can be read"),
    ],
)
def test_unreadable_weights(network_file, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        user_code.load(network_file, tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantized tensors"),
        (lambda w: w.to(torch.complex64) * 1j, "complex tensors"),
        (lambda w: (w * 100).to(torch.int8), "1 of another type: .*: file int8, network float32"),
    ],
    ids=["quantized", "complex", "whole numbers"],
)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_tensors_that_are_no_float_weights_are_refused(network_file, state, tmp_path, change, message):
    name = next(k for k, v in state.items() if v.dim() > 1)
    torch.save({**state, name: change(state[name])}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=message):
        user_code.load(network_file, tmp_path / "odd.pt")


def test_a_checkpoint_inside_itself_is_no_checkpoint(network_file, tmp_path):
    endless: dict[str, object] = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.pt")
    with pytest.raises(InputError, match="holds no weights"):
        user_code.load(network_file, tmp_path / "endless.pt")


def test_a_file_of_bare_shapes_is_refused(network_file, state, tmp_path):
    torch.save({k: v.to("meta") for k, v in state.items()}, tmp_path / "meta.pt")
    with pytest.raises(InputError, match="shapes without values"):
        user_code.load(network_file, tmp_path / "meta.pt")


def test_checkpoint_without_tensors(network_file, tmp_path):
    torch.save({"epoch": 1, "loss": 0.5}, tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"holds no weights \(found: epoch, loss\)"):
        user_code.load(network_file, tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121"])
def test_published_files_with_older_layouts(tmp_path, name):
    from torchvision import models

    module = models.get_model(name, weights=None)
    state = {}
    for key, value in module.state_dict().items():
        # The DenseNet files on torchvision's server call layers norm.1 where the code says norm1.
        old = key
        if "denselayer" in key:
            for layer in ("norm1", "norm2", "conv1", "conv2"):
                old = old.replace(layer, f"{layer[:-1]}.{layer[-1]}")
        state[old] = value.clone()
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_model(name, weights=tmp_path / "weights.safetensors")
    assert loaded.weights_sha256 == hash_state(module.state_dict())


@pytest.mark.parametrize("spec", ["resnet18", "squeezenet1_1", "timm:resnet18"])
def test_fine_tuned_head_sets_the_number_of_classes(tmp_path, spec):
    if spec.startswith("timm:"):
        builder = pytest.importorskip("timm").create_model
        name = spec.removeprefix("timm:")
    else:
        from torchvision import models

        builder, name = models.get_model, spec
    torch.save(builder(name, num_classes=7).state_dict(), tmp_path / "tuned.pth")
    loaded = load_model(spec, weights=tmp_path / "tuned.pth")
    assert loaded.module(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_weights_come_from_the_hub_cache(tmp_path, monkeypatch):
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    entry = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    module = models.squeezenet1_1(weights=None)
    torch.save(module.state_dict(), cache / Path(entry.url).name)
    for weights in (None, "IMAGENET1K_V1", Path("DEFAULT")):
        loaded = load_model("squeezenet1_1", weights=weights)
        assert loaded.weights == "torchvision IMAGENET1K_V1"
        assert loaded.weights_sha256 == hash_state(module.state_dict())
    with pytest.raises(InputError, match="neither a file nor a weight set") as caught:
        load_model("squeezenet1_1", weights="IMAGENET1K_V7")
    assert "IMAGENET1K_V1" in caught.value.hint


def test_unreachable_weights_name_the_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights_module.urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=r"resnet18-f37072fd\.pth is not cached") as caught:
        load_model("resnet18")
    assert "--weights FILE" in caught.value.hint
    assert str(tmp_path / "hub" / "checkpoints") in caught.value.hint


def test_timm_weights_unreachable_or_cached(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(weights_module.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args: None)
    with pytest.raises(InputError, match=r"model\.safetensors of timm/resnet18\.a1_in1k is not cached"):
        load_model("timm:resnet18")
    module = timm.create_model("resnet18")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args: str(tmp_path / "model.safetensors"))
    loaded = load_model("timm:resnet18")
    assert loaded.weights == "timm a1_in1k"
    assert loaded.weights_sha256 == hash_state(module.state_dict())
    assert loaded.preprocessing.resize == 235
    assert loaded.preprocessing.interpolation == "bicubic"


def test_downloads_are_checked_and_leave_no_remains(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content = b"some weights"
    digest = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setattr(weights_module.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(content))
    assert cached_weights(f"https://host/a/net-{digest}.pth").read_bytes() == content
    with pytest.raises(InputError, match="damaged"):
        cached_weights("https://host/a/net-00000000.pth")
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()] == [f"net-{digest}.pth"]
