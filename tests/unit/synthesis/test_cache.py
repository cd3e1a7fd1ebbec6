"""Synthetic images are made once: kept by content, continued where they stopped, never a reason to fail."""

import errno

import pytest
import torch
from interruptions import interrupt_synthesis
from networks import SIZE, conv_bn, trained
from torch import nn

from metaaug_cli.errors import InputError
from metaaug_cli.graph.capture import export_program
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.synthesis import cache as synthesis_cache
from metaaug_cli.synthesis.cache import cached_synthetic_set
from metaaug_cli.synthesis.dgh import SynthesisSettings, synthesize_calibration_set

PREPROCESSING = Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.25,) * 3)
SETTINGS = SynthesisSettings(num=3, batch_size=2, iterations=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program():
    network = nn.Sequential(conv_bn(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return export_program(trained(network).requires_grad_(False), SIZE)


@pytest.fixture
def model(program):
    return LoadedModel(program, "net", PREPROCESSING, "random", "0" * 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "synthetic"


def made(model, settings=SETTINGS):
    """The set, and how many steps it took now."""
    ticks = []
    stored = cached_synthetic_set(model, settings, device=CPU, tick=lambda *step: ticks.append(step))
    return stored, len(ticks)


def test_the_second_run_takes_the_first_ones_images(model, cache):
    wanted = synthesize_calibration_set(model, SETTINGS)
    assert made(model)[1] == SETTINGS.steps
    stored, steps = made(model)
    assert steps == 0
    assert stored.sha256 == wanted.sha256
    assert [p.suffix for p in cache.iterdir()] == [".safetensors"]


def test_another_network_seed_or_count_gets_images_of_its_own(model, program, cache):
    made(model)
    other = LoadedModel(program, "net", PREPROCESSING, "random", "1" * 64)
    assert made(other)[1] > 0
    assert made(model, SynthesisSettings(num=3, batch_size=2, iterations=3, seed=1))[1] > 0
    assert made(model, SynthesisSettings(num=2, batch_size=2, iterations=3))[1] > 0
    assert len(list(cache.iterdir())) == 4


def test_an_interrupted_synthesis_goes_on(model, cache, monkeypatch):
    wanted = synthesize_calibration_set(model, SETTINGS)
    with monkeypatch.context() as patch:
        interrupt_synthesis(patch, at=4)
        with pytest.raises(KeyboardInterrupt):
            made(model)
    stored, steps = made(model)
    assert steps == SETTINGS.steps - 4
    assert stored.sha256 == wanted.sha256


@pytest.mark.parametrize("suffix", [".safetensors", ".partial"])
def test_damaged_files_are_made_again(model, cache, suffix):
    wanted, _ = made(model)
    (path,) = cache.iterdir()
    path.unlink()
    path.with_suffix(suffix).write_bytes(b"damaged")
    stored, steps = made(model)
    assert steps == SETTINGS.steps
    assert stored.sha256 == wanted.sha256


@pytest.mark.parametrize("place", ["file", "none"])
def test_without_a_cache_nothing_is_kept(model, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAAUG_CACHE", str(tmp_path / "file"))
    if place == "none":
        monkeypatch.setattr(synthesis_cache, "cache_directory", lambda: None)
    assert made(model)[1] == made(model)[1] == SETTINGS.steps


@pytest.mark.parametrize(
    "error", [InputError("cannot write: no rights"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_place_that_takes_no_file_does_not_lose_the_images(model, monkeypatch, caplog, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(synthesis_cache, "save_calibration_set", refused)
    assert len(made(model)[0].images) == 3
    assert f"not kept: {error}" in caplog.text


def test_without_room_for_the_state_the_images_are_made_all_the_same(model, monkeypatch, caplog):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metaaug_cli.synthesis.state.save_file", full_disk)
    stored, steps = made(model)
    assert steps == SETTINGS.steps
    assert stored.sha256 == synthesize_calibration_set(model, SETTINGS).sha256
    assert caplog.text.count("No space left on device") == 1


def test_images_of_a_network_with_other_code_are_not_taken(model, cache):
    made(model)
    network = nn.Sequential(conv_bn(3, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    program = export_program(trained(network).requires_grad_(False), SIZE)
    assert made(LoadedModel(program, "net", PREPROCESSING, "random", "0" * 64))[1] > 0
