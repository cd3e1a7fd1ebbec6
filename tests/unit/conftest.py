"""Exported networks that several tests read."""

from functools import cache
from types import ModuleType

import deployed_networks
import pytest

from metaaug_cli.export import export_onnx
from metaaug_cli.manifest import Manifest


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
