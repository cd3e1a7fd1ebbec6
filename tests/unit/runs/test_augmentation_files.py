"""The augmenter's files in a run directory: written whole, read back, shown as far as they can be read."""

import json

import pytest
import torch
from augmenters import data_of, learned_augmentation, teach
from PIL import Image
from safetensors.torch import save_file

from metaaug_cli.errors import InputError
from metaaug_cli.quantization.reconstruct import BlockHistory
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.runs.artifacts import RunDirectory
from metaaug_cli.runs.augmentation_files import AugmentationFiles
from metaaug_cli.runs.run_info import Fingerprint, RunInfo

INFO = RunInfo("net", "random", {}, 5, {}, Fingerprint("a", "b", "c", "d"), [], "cpu")
HISTORY = BlockHistory(
    2.0, 1.0, losses={"originals": 1.0, "trained": 1.5}, augmentation={"distance": 0.1, "similarity": 1.0}
)


@pytest.fixture
def run(tmp_path):
    """A run directory after block 1: (files, block, augmenter, its history)."""
    learned = learned_augmentation()
    directory = RunDirectory(tmp_path)
    directory.start(INFO, Recipe(), None, resume=False)
    files = AugmentationFiles(directory, [block.name for block in learned.passes.blocks])
    meta = teach(learned)
    block, _ = data_of(learned, 1)
    files.save(block, learned, meta, learned.make(block, torch.Generator()))
    directory.save_block(block, HISTORY)
    return files, block, learned, meta


def page(files):
    files.write_page()
    return (files.folder / "index.html").read_text(encoding="utf-8")


def test_every_file_of_a_block_is_there_and_no_temporary_one(run):
    files, block, learned, meta = run
    names = {p.name for p in files.folder.iterdir()}
    assert names == {f"001-{block.name}{suffix}" for suffix in (".safetensors", ".json", ".png")}
    content = json.loads(files.path(1, block.name, ".json").read_text())
    assert len(content["records"]) == len(meta.records) == 3
    assert content["records"][1]["distance"] == meta.records[1].distance
    assert content["epsilon"] == learned.augmenter.spec.epsilon
    with Image.open(files.path(1, block.name, ".png")) as sheet:
        assert sheet.width > 8 * 112


def test_the_augmenter_is_read_back(run):
    files, block, learned, _ = run
    other = learned_augmentation()
    files.load(block, other)
    for name, value in learned.state().items():
        assert torch.equal(value, other.state()[name]), name


def test_edge_blocks_have_no_augmenter_to_read(run):
    files, _, learned, _ = run
    fresh = learned_augmentation()
    files.load(learned.passes.blocks[0], fresh)
    assert all(
        torch.equal(value, fresh.state()[name]) for name, value in learned_augmentation().state().items()
    )


def test_a_missing_augmenter_is_an_error_with_a_way_out(run):
    files, _, learned, _ = run
    with pytest.raises(InputError) as caught:
        files.load(learned.passes.blocks[2], learned)
    assert "--resume" in caught.value.hint


def test_another_augmenters_file_is_an_error_with_a_way_out(run):
    files, block, learned, _ = run
    path = files.path(block.index, block.name)
    save_file({"augmenter/other": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="does not hold this run's augmenter") as caught:
        files.load(block, learned)
    assert "--resume" in caught.value.hint


def test_the_page_shows_finished_blocks_only(run):
    files, block, learned, meta = run
    unfinished = learned.passes.blocks[2]
    files.save(unfinished, learned, meta, learned.make(unfinished, torch.Generator()))
    text = page(files)
    assert f"1 of {len(files.names)} blocks" in text
    assert text.count(f"<h2>{block.name}</h2>") == 1
    assert unfinished.name not in text


@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_a_damaged_block_leaves_its_errors_in_the_table(run, suffix):
    files, block, _, _ = run
    files.path(1, block.name, suffix).unlink()
    text = page(files)
    assert f"<td>{block.name}</td>" in text
    assert "<svg" not in text


def test_writing_the_page_twice_gives_the_same_bytes(run):
    files, _, _, _ = run
    assert page(files) == page(files)
