"""Exported networks and a user's own network, which several tests read."""

from functools import cache
from types import ModuleType

import deployed_networks
import pytest
import torch
import user_code

from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.networks.models import load_model


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """Small deployed networks, ``deployed_networks.py``."""
    return deployed_networks


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return Manifest(model="small", placement="integer", method="nearest", weight_bits={"conv1": 4})


@pytest.fixture(scope="session")
def exported(networks, manifest, tmp_path_factory):
    """``exported("W4A4")`` or ``exported(NetworkClass)``: graph and path of its int8 file, made once."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def export(which):
        bits = networks.BITS.get(which) if isinstance(which, str) else None
        graph = networks.as_graph(networks.Residual(*bits) if bits else which())
        path = folder / f"{which if bits else which.__name__}.onnx"
        export_onnx(graph, input_size=networks.SIZE, path=path, manifest=manifest)
        return graph, path

    return export


@pytest.fixture
def network_file(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(user_code.NETWORK)
    return path


@pytest.fixture
def state(network_file):
    """A trained-looking state dict of the network, different from what its factory initialises."""
    module = load_model(f"{network_file}:build", weights="random", **user_code.FLAGS).module
    return {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in module.state_dict().items()}
