"""Files are timed side by side."""

import time

import pytest
import torch
from onnx import load

from metaaug_cli.deployment import latency
from metaaug_cli.deployment.latency import FLOAT, Candidate, export_float, measure, measure_forms
from metaaug_cli.deployment.ort import open_session
from metaaug_cli.errors import GraphError, InputError


@pytest.fixture
def fake_sessions(monkeypatch):
    """Sessions that take as many milliseconds as their file is called, and note the order of calls."""
    calls = []

    class Session:
        def __init__(self, path, **settings):
            self.name, self.settings = path.name, settings

        def get_inputs(self):
            return [type("Input", (), {"name": "input"})]

        def run(self, _, feeds):
            calls.append((self.name, feeds["input"].shape))
            time.sleep(int(self.name) / 1000 * len(feeds["input"]))

    monkeypatch.setattr(latency, "open_session", Session)
    return calls


def test_rounds_are_interleaved_and_each_batch_is_timed(fake_sessions, tmp_path):
    for name, size in (("2", 40), ("6", 10)):
        (tmp_path / name).write_bytes(b"x" * size)
    ticks = []
    found = measure(
        {"fast": Candidate(tmp_path / "2", {}), "slow": Candidate(tmp_path / "6", {})},
        (3, 4, 5),
        batches=(1, 2),
        rounds=3,
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert [name for name, _ in fake_sessions[:6]] == ["2", "6"] * 3
    assert {shape for _, shape in fake_sessions} == {(1, 3, 4, 5), (2, 3, 4, 5)}
    assert ticks == [(n, 10) for n in range(1, 11)]
    assert (found["fast"].size_bytes, found["slow"].size_bytes) == (40, 10)
    for batch in (1, 2):
        assert found["fast"].milliseconds[batch] >= 2 * batch
        assert found["slow"].milliseconds[batch] >= 6 * batch


def test_one_slow_round_does_not_move_the_result(monkeypatch, tmp_path):
    (tmp_path / "m").touch()
    clock = iter([0, 1, 0, 1, 0, 1, 0, 1000, 0, 1])
    monkeypatch.setattr(latency, "open_session", lambda *_, **__: StubSession())
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    found = measure({"m": Candidate(tmp_path / "m", {})}, (1, 1, 1), batches=(1,), rounds=3)
    assert found["m"].milliseconds[1] == 1000


class StubSession:
    def get_inputs(self):
        return [type("Input", (), {"name": "input"})]

    def run(self, _, feeds):
        pass


def test_an_8_bit_network_has_one_quantized_form(exported, networks):
    graph = exported("W8A8")[0]
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
    found = measure_forms(plain, graph, networks.SIZE, rounds=1)
    assert list(found) == [FLOAT, "int8"]


def test_the_float_file_computes_the_network(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()).eval()
    path = tmp_path / "float.onnx"
    export_float(network, (3, 6, 6), path)
    assert len(load(path, load_external_data=False).graph.initializer) >= 2
    assert list(tmp_path.iterdir()) == [path]
    images = torch.randn(5, 3, 6, 6)
    (output,) = open_session(path).run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), network(images).detach())


def test_what_cannot_be_exported_or_loaded_is_said(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match="cannot be written as ONNX"):
        export_float(Odd(), (3, 6, 6), tmp_path / "odd.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(InputError, match="does not load"):
        measure({"bad": Candidate(tmp_path / "bad.onnx", {})}, (3, 6, 6))
