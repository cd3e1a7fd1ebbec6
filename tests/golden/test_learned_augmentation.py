"""The method with a learned augmenter: its files, and a killed run that resumes to the same bytes."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from golden_run import (
    BLOCKS,
    KILLED,
    TESTS,
    Recorder,
    block_files,
    calibration,
    exported,
    recipe,
    without_seconds,
)
from networks import images

from metaaug_cli.pipeline import quantize

LEARNED = [
    *("augmentation.kind=metaaug", "quantization.act_bits=2", "calibration.holdout=8"),
    *("reconstruction.iterations=4", "metaaug.steps=8", "metaaug.batch_size=8", "metaaug.val_batch_size=8"),
    *("metaaug.base_width=16", "metaaug.warmup_steps=250"),
]


def augmentation_files(run):
    """Bytes of every file on the augmenter, but of the outer steps what they measured."""
    files = {p.name: p for p in (run / "augmentation").iterdir()}
    return {
        name: without_seconds(json.loads(p.read_text())) if p.suffix == ".json" else p.read_bytes()
        for name, p in files.items()
    }


@pytest.fixture(scope="module", params=["residual", "unet", "policy"])
def learned(request, tmp_path_factory):
    """A complete run with a learned augmenter: (directory, result, its settings)."""
    settings = [*LEARNED, f"metaaug.form={request.param}"]
    folder = tmp_path_factory.mktemp("learned") / "run"
    result = quantize(exported(), calibration(), recipe=recipe(*settings), run_dir=folder, device="cpu")
    return folder, result, settings


def test_a_run_with_an_augmenter_shows_it_for_every_block_it_learned_from(learned):
    folder, result, _ = learned
    files = augmentation_files(folder)
    stems = [f"{i:03d}-{name}" for i, name in enumerate(BLOCKS)][1:-1]
    suffixes = (".safetensors", ".json", ".png")
    assert set(files) == {"index.html", *(stem + suffix for stem in stems for suffix in suffixes)}
    states = [files[f"{stem}.safetensors"] for stem in stems]
    assert len(set(states)) == len(states), "the augmenter learns from block to block"
    for block, history in zip(result.chain.blocks, result.histories, strict=True):
        assert history.losses.keys() == {"originals", "trained", "held_back"}
        assert bool(history.augmentation) != block.is_edge


def test_the_metrics_hold_every_blocks_errors_by_image_set(learned):
    folder, result, _ = learned
    metrics = json.loads((folder / "metrics.json").read_text())["blocks"]
    assert metrics.keys() == set(BLOCKS)
    for name, history in zip(BLOCKS, result.histories, strict=True):
        assert metrics[name]["losses"] == history.losses
        assert metrics[name]["augmentation"] == history.augmentation
    assert metrics[BLOCKS[1]]["augmentation"].keys() == {"distance", "similarity", "seconds"}


def test_a_run_killed_while_it_teaches_the_augmenter_resumes_to_the_same_bytes(learned, tmp_path):
    complete, result, settings = learned
    run = tmp_path / "run"
    arguments = [str(TESTS), str(run), "inside the augmenter's steps", *settings]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((run / "blocks").glob("*.json"))) == 2
    assert len(list((run / "augmentation").glob("*.safetensors"))) == 1
    resumed = quantize(
        exported(), calibration(), recipe=recipe(*settings), run_dir=run, resume=True, device="cpu"
    )
    assert block_files(run) == block_files(complete)
    assert augmentation_files(run) == augmentation_files(complete)
    assert torch.equal(resumed.deployed(images(4)), result.deployed(images(4)))


def test_a_lost_augmenter_is_learned_again_with_its_block(learned, tmp_path):
    complete, _, settings = learned
    run = tmp_path / "run"
    shutil.copytree(complete, run)
    (run / "augmentation" / "002-layer1.1.safetensors").unlink()
    recorder = Recorder()
    quantize(
        exported(),
        calibration(),
        recipe=recipe(*settings),
        run_dir=run,
        resume=True,
        device="cpu",
        progress=recorder,
    )
    assert recorder.blocks == [(name, i < 2) for i, name in enumerate(BLOCKS)]
    assert block_files(run) == block_files(complete)
    assert augmentation_files(run) == augmentation_files(complete)
