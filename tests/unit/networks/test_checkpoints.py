"""Which weights of a checkpoint are taken, and what is said of the others."""

import pytest
import torch
import user_code
from safetensors.torch import save_model

from metaaug_cli.errors import InputError
from metaaug_cli.networks.models import load_model


def with_prefix(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def averaged(state):
    return {k: v * 0.5 if v.is_floating_point() else v for k, v in state.items()}


def swa(state):
    return {"n_averaged": torch.tensor(3), **with_prefix(averaged(state), "module.")}


def loaded(network_file, tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "net.pth")
    return user_code.load(network_file, tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("checkpoint", "entry", "beside"),
    [
        (lambda s: {"state_dict": s, "state_dict_ema": averaged(s)}, "state_dict", "state_dict_ema"),
        (lambda s: {"model_ema": swa(s), "model": s}, "model", "model_ema"),
        (lambda s: {"model": {"net": s, "ema": averaged(s)}}, "model.net", "ema"),
    ],
    ids=["timm", "torchvision", "nested"],
)
def test_averaged_weights_beside_others_are_named_and_not_taken(
    network_file, state, tmp_path, caplog, checkpoint, entry, beside
):
    found = loaded(network_file, tmp_path, checkpoint(state))
    assert torch.equal(found.module.conv.weight, state["conv.weight"])
    assert found.weights == f"net.pth, its '{entry}' entry"
    (warning,) = caplog.messages
    assert f"from its '{entry}' entry" in warning
    assert f"(EMA) lie beside it in '{beside}'" in warning


@pytest.mark.parametrize("key", ["ema", "state_dict_ema", "ema_state_dict", "model_ema", "swa_model", None])
def test_averaged_weights_alone_are_taken(network_file, state, tmp_path, caplog, key):
    found = loaded(network_file, tmp_path, {key: swa(state), "epoch": 1} if key else swa(state))
    assert torch.equal(found.module.conv.weight, state["conv.weight"] * 0.5)
    assert found.weights == (f"net.pth, its '{key}' entry" if key else "net.pth")
    assert caplog.messages == []


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda s: {"epoch": torch.tensor(3), "loss": torch.tensor(0.1), "state_dict": s},
        lambda s: {"weights": s},
        lambda s: {"model": {"name": "net"}, "net": s},
        lambda s: with_prefix(s, "_fsdp_wrapped_module."),
        lambda s: {k.replace(".", "._fsdp_wrapped_module."): v for k, v in s.items()},
        lambda s: with_prefix(s, "encoder."),
        lambda s: {**s, "total_ops": torch.ones(1), "conv.total_params": torch.ones(1)},
    ],
    ids=["tensors beside", "weights", "named model", "fsdp", "fsdp inside", "encoder", "thop"],
)
def test_weights_are_found(network_file, state, tmp_path, caplog, checkpoint):
    found = loaded(network_file, tmp_path, checkpoint(state))
    assert all(torch.equal(v, state[k]) for k, v in found.module.state_dict().items())
    assert caplog.messages == []


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "model.module."])
def test_what_lies_outside_the_networks_prefix_is_left_out(network_file, state, tmp_path, caplog, prefix):
    others = {"criterion.weight": torch.ones(10), "model_ema.module.fc.bias": torch.ones(4)}
    found = loaded(network_file, tmp_path, {"state_dict": {**with_prefix(state, prefix), **others}})
    assert all(torch.equal(v, state[k]) for k, v in found.module.state_dict().items())
    assert caplog.messages[0].endswith("2 others: criterion.weight, model_ema.module.fc.bias")


def test_two_networks_under_prefixes_of_their_own_are_refused(network_file, state, tmp_path):
    both = {**with_prefix(state, "net."), **with_prefix(averaged(state), "model.")}
    with pytest.raises(InputError, match="unexpected"):
        loaded(network_file, tmp_path, both)


def test_names_that_fit_as_they_are_come_before_those_under_a_prefix(network_file, state, tmp_path):
    own = {name: value for name, value in state.items() if name.startswith("fc.")}
    found = loaded(network_file, tmp_path, {**own, **with_prefix(averaged(state), "backbone.")})
    assert torch.equal(found.module.fc.weight, state["fc.weight"])
    assert torch.equal(found.module.conv.weight, state["conv.weight"] * 0.5)


def test_weights_at_the_top_come_before_others_beside_them(network_file, state, tmp_path, caplog):
    found = loaded(network_file, tmp_path, {**state, "ema": averaged(state)})
    assert torch.equal(found.module.conv.weight, state["conv.weight"])
    assert "from its top level; averaged ones (EMA) lie beside it in 'ema'" in caplog.text


def test_a_file_with_more_than_the_network_is_refused_for_that(network_file, state, tmp_path):
    with pytest.raises(InputError, match=r"1 unexpected: head\.weight") as caught:
        loaded(network_file, tmp_path, {**state, "head.weight": torch.ones(2)})
    assert "every weight of the network is there" in caught.value.hint


def test_a_tied_layer_needs_one_of_its_names(tmp_path):
    text = """
from torch import nn

def build():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    net[1].weight = net[0].weight
    return net
"""
    (tmp_path / "net.py").write_text(text)
    spec = f"{tmp_path / 'net.py'}:build"
    network = load_model(spec, weights="random", **user_code.FLAGS).module
    network[0].weight.data.fill_(0.25)
    save_model(network, tmp_path / "net.safetensors")
    found = load_model(spec, weights=tmp_path / "net.safetensors", **user_code.FLAGS).module
    assert found[1].weight is found[0].weight
    assert found[1].weight.unique().tolist() == [0.25]
