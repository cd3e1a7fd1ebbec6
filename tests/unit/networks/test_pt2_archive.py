"""Exported programs load when they hold tensors and a graph, and nothing that would be executed."""

import json
import pickle
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim
from user_code import FLAGS, Exploit

from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.models import load_model
from metaaug_cli.networks.pt2_archive import load_program
from metaaug_cli.networks.weights import hash_state


@pytest.fixture
def program_file(network_file, tmp_path):
    module = load_model(f"{network_file}:trained", **FLAGS).module
    batch = ({0: Dim("batch", min=1, max=64)},)
    program = torch.export.export(module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def rewrite(path, change):
    """Write a changed copy of an archive: ``change(name, data)`` gives the new data, None drops it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            new = change(name, data)
            if new is not None:
                archive.writestr(name, new)
    return target


def edit_graph(path, edit):
    def change(name, data):
        if "/models/" not in name:
            return data
        graph = json.loads(data)
        edit(graph)
        return json.dumps(graph).encode()

    return rewrite(path, change)


def test_program_loads_with_its_own_size(program_file, network_file):
    module = load_model(f"{network_file}:trained", **FLAGS).module
    loaded = load_model(str(program_file), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (loaded.name, loaded.weights) == ("net", "net.pt2")
    assert loaded.preprocessing.size == (8, 8)
    assert loaded.weights_sha256 == hash_state(module.state_dict())
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.module.module()(images), module(images))
    with pytest.raises(UsageError, match="--weights cannot be combined"):
        load_model(str(program_file), weights="random", **FLAGS)
    with pytest.raises(UsageError, match="--mean, --std missing"):
        load_model(str(program_file))


def test_pickled_sample_inputs_are_never_read(program_file, tmp_path):
    marker = tmp_path / "owned"
    payload = pickle.dumps(Exploit(marker))
    changed = rewrite(program_file, lambda name, data: payload if "sample_inputs" in name else data)
    load_program(changed)
    assert not marker.exists()


def test_guards_are_never_compiled(program_file, tmp_path):
    marker = tmp_path / "owned"

    def edit(graph):
        graph["guards_code"] = [f"__import__('os').mkdir({str(marker)!r}) or True"]

    program = load_program(edit_graph(program_file, edit))
    program.module()(torch.zeros(2, 3, 8, 8))
    assert not marker.exists()


def nested(value, wanted):
    """Every JSON object below ``value`` that has the key ``wanted``."""
    if isinstance(value, dict):
        if wanted in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from nested(item, wanted)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", "torch.os.system", "not a PyTorch operator"),
        ("target", "torch.ops.aten.__class__.mro", "not a PyTorch operator"),
        ("target", "torch.ops.load_library.__call__.x", "not a PyTorch operator"),
        ("target", "#extension", "not a PyTorch operator"),
        ("expr_str", "__import__('os').system('true')", "not arithmetic"),
        ("expr_str", "s0.__class__", "not arithmetic"),
        ("expr_str", "preview(s0)", "not arithmetic"),
    ],
)
def test_graphs_that_reach_beyond_operators_are_refused(program_file, key, value, message):
    def edit(graph):
        next(nested(graph, key))[key] = value

    with pytest.raises(InputError, match=message):
        load_program(edit_graph(program_file, edit))


@pytest.mark.parametrize(
    "member",
    [
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/weights/net.pt",
        "data/aotinductor/net/a.so",
    ],
)
def test_archives_with_executable_members_are_refused(program_file, member):
    root = zipfile.ZipFile(program_file).namelist()[0].split("/")[0]
    changed = rewrite(program_file, lambda name, data: data)
    with zipfile.ZipFile(changed, "a") as archive:
        archive.writestr(f"{root}/{member}", b"x")
    with pytest.raises(InputError, match="load by executing it"):
        load_program(changed)


def test_pickled_weights_in_a_program_are_refused(program_file):
    def change(name, data):
        return (
            data.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else data
        )

    with pytest.raises(InputError, match="as a pickle"):
        load_program(rewrite(program_file, change))


@pytest.mark.parametrize("kind", ["absent", "garbage", "zip", "truncated"])
def test_files_that_are_no_program(program_file, tmp_path, kind):
    path = tmp_path / "other.pt2"
    if kind == "garbage":
        path.write_bytes(b"garbage")
    elif kind == "zip":
        torch.save({"a": torch.zeros(1)}, path)
    elif kind == "truncated":
        path.write_bytes(program_file.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"no exported program|not a readable|not a torch\.export archive"):
        load_model(str(path), **FLAGS)


def test_half_precision_programs_are_refused(tmp_path):
    program = torch.export.export(nn.Linear(3, 2).half(), (torch.zeros(1, 3, dtype=torch.float16),))
    torch.export.save(program, tmp_path / "half.pt2")
    with pytest.raises(InputError, match="float16 weights"):
        load_model(str(tmp_path / "half.pt2"), **FLAGS)
