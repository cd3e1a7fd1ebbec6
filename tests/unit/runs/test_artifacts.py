"""The run directory: what it keeps, what it refuses to continue, and what it says then."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import SIZE, family, images, placed, trained
from safetensors.torch import save
from torch import nn

from metaaug_cli.errors import InputError, RecipeError, UsageError
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.graph_tools import hash_graph
from metaaug_cli.quantization.blocks import build_chain, search_activation_scales
from metaaug_cli.quantization.reconstruct import BlockHistory
from metaaug_cli.recipe.config import Recipe
from metaaug_cli.runs.artifacts import RunDirectory, read_info
from metaaug_cli.runs.environment import environment
from metaaug_cli.runs.finished import load_run
from metaaug_cli.runs.run_info import Fingerprint, RunInfo

INFO = RunInfo(
    model="net",
    weights="random",
    preprocessing={"mean": (0.5,), "size": [8, 8]},
    num_outputs=5,
    calibration={},
    fingerprint=Fingerprint(recipe="a", weights="b", graph="c", calibration="d"),
    blocks=["stem", "body/0", "head"],
    device="cpu",
)


@pytest.fixture
def started(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert directory.start(INFO, Recipe(), None, resume=False) == 0
    return directory


def finish_block(directory, index):
    directory.block_path(index, INFO.blocks[index]).write_bytes(save({"scale": torch.ones(1)}))
    history = '{"loss_before": 1.0, "loss_after": 0.5}'
    directory.block_path(index, INFO.blocks[index], ".json").write_text(history)


def test_a_started_run_says_what_it_is(started):
    info = read_info(started.path)
    assert (info["status"], info["model"], info["blocks"]) == ("running", "net", INFO.blocks)
    assert info["fingerprint"] == {"recipe": "a", "weights": "b", "graph": "c", "calibration": "d"}
    assert info["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert not [p for p in started.path.rglob("*") if p.name.endswith(".tmp")]


def test_a_taken_directory_is_refused_and_left_alone(started):
    before = (started.path / "run.json").read_bytes()
    with pytest.raises(UsageError, match="already holds a run") as caught:
        started.start(INFO, Recipe(), None, resume=False)
    assert "--resume" in caught.value.hint
    assert (started.path / "run.json").read_bytes() == before


def test_a_claimed_directory_is_refused_until_it_is_let_go(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(path).claim(resume=False):
        for resume in (False, True):
            with (
                pytest.raises(UsageError, match="another run is being written"),
                RunDirectory(path).claim(resume=resume),
            ):
                pass
    with RunDirectory(path).claim(resume=False):  # the log that is left is in nobody's way
        RunDirectory(path).start(INFO, Recipe(), None, resume=False)
    with pytest.raises(UsageError, match="already holds a run"), RunDirectory(path).claim(resume=False):
        pass
    with RunDirectory(path).claim(resume=True):
        pass


def test_claiming_leaves_nothing_among_other_files(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(UsageError, match="holds other files"), RunDirectory(tmp_path).claim(resume=False):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["notes.md"]


def test_a_name_whose_files_could_not_be_read_back_is_refused(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    with pytest.raises(UsageError, match="not valid UTF-8"):
        RunDirectory(path).require_utf8()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("recipe", "the recipe"),
        ("weights", "the model's weights"),
        ("graph", "the model's code"),
        ("calibration", "the calibration set"),
    ],
)
def test_resuming_something_else_names_what_changed(started, field, said):
    other = replace(INFO, fingerprint=replace(INFO.fingerprint, **{field: "changed"}))
    with pytest.raises(RecipeError) as caught:
        started.start(other, Recipe(), None, resume=True)
    names = {"the recipe", "the model's weights", "the model's code", "the calibration set"}
    assert {name for name in names if name in caught.value.message} == {said}
    assert "another --out" in caught.value.hint


def test_every_change_is_named(started):
    other = replace(INFO, fingerprint=Fingerprint("1", "b", "c", "2"))
    with pytest.raises(RecipeError, match="the recipe and the calibration set changed"):
        started.start(other, Recipe(), None, resume=True)


def test_other_preparation_is_not_called_other_images(started):
    prepared = replace(INFO, preprocessing={"mean": (0.4,), "size": [8, 8]})
    other = replace(prepared, fingerprint=replace(INFO.fingerprint, calibration="changed"))
    with pytest.raises(RecipeError, match=r"how images are prepared \(mean\) changed"):
        started.start(other, Recipe(), None, resume=True)


def test_resuming_counts_the_finished_blocks_in_order(started):
    assert started.start(INFO, Recipe(), None, resume=True) == 0
    finish_block(started, 0)
    assert started.start(INFO, Recipe(), None, resume=True) == 1
    finish_block(started, 2)  # block 1 is missing, so block 2 was made from something else
    assert started.start(INFO, Recipe(), None, resume=True) == 1
    started.block_path(1, INFO.blocks[1]).write_bytes(b"state")  # killed before the history was written
    assert started.start(INFO, Recipe(), None, resume=True) == 1
    finish_block(started, 1)
    assert started.start(INFO, Recipe(), None, resume=True) == 2
    assert not started.block_path(2, INFO.blocks[2]).exists()
    finish_block(started, 2)
    assert started.start(INFO, Recipe(), None, resume=True) == 3


def test_going_on_with_other_software_is_said(started, monkeypatch, caplog):
    before = environment()
    assert started.start(INFO, Recipe(), None, resume=True) == 0
    assert caplog.text == ""
    changed = {**before, "torch": "1.0", "platform": "elsewhere"}
    monkeypatch.setattr("metaaug_cli.runs.run_info.environment", lambda: changed)
    started.start(INFO, Recipe(), None, resume=True)
    assert f"torch {before['torch']} -> 1.0" in caplog.text
    assert "elsewhere" not in caplog.text


def test_block_files_stay_inside_their_folder(started):
    path = started.block_path(1, "../../etc/passwd")
    assert path.parent == started.path / "blocks"


def test_an_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        RunDirectory(tmp_path / "file" / "run").start(INFO, Recipe(), None, resume=False)


def test_a_file_in_the_place_of_the_augmenters_folder_is_a_clear_error(started):
    (started.path / "augmentation").touch()
    with pytest.raises(InputError, match=r"cannot write .*augmentation"):
        started.start(INFO, Recipe(), None, resume=True)


def test_a_folder_in_the_place_of_a_blocks_file_is_a_clear_error(started):
    started.block_path(0, INFO.blocks[0], ".json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*json"):
        started.start(INFO, Recipe(), None, resume=True)


def test_blocks_travel_through_their_files(started):
    module = family("mobile")
    chain, fresh = (build_chain(module, placed(module)) for _ in range(2))
    history = BlockHistory(2.5, 1.25, 3.0, [(0, 2.0), (1, 1.5)])
    values = (images(8),)
    for block in chain.blocks:
        search_activation_scales(block, values)
        values = tuple(v.detach() for v in block.quantized_block(*values))
        with torch.no_grad():
            for q in block.weights.values():
                q.rounding_logits.neg_()
        started.save_block(block, history)
    for block, other in zip(chain.blocks, fresh.blocks, strict=True):
        loaded = started.load_block(other)
        assert (loaded.loss_before, loaded.loss_after, loaded.seconds) == (2.5, 1.25, 3.0)
        assert [tuple(point) for point in loaded.curve] == history.curve
        for key, value in block.state().items():
            assert torch.equal(other.state()[key], value), key


def test_a_damaged_block_is_named(started):
    module = family("mobile")
    block = build_chain(module, placed(module)).blocks[0]
    started.save_block(block, BlockHistory(1.0, 1.0))
    path = started.block_path(0, block.name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError) as caught:
        started.load_block(block)
    assert path.name in caught.value.message
    assert "--resume" in caught.value.hint


def test_a_file_of_another_block_is_named(started):
    module = family("mobile")
    first, second = build_chain(module, placed(module)).blocks[:2]
    started.save_block(first, BlockHistory(1.0, 1.0))
    started.save_block(second, BlockHistory(1.0, 1.0))
    started.block_path(0, first.name).write_bytes(started.block_path(1, second.name).read_bytes())
    with pytest.raises(InputError, match=f"does not hold block {first.name}") as caught:
        started.load_block(first)
    assert "--resume" in caught.value.hint


def test_a_block_of_another_run_is_noticed(started, tmp_path):
    block = build_chain(family("mobile"), placed(family("mobile"))).blocks[0]
    other = RunDirectory(tmp_path / "other")
    other.start(
        replace(INFO, fingerprint=replace(INFO.fingerprint, recipe="z")), Recipe(), None, resume=False
    )
    other.save_block(block, BlockHistory(1.0, 1.0))
    path = started.block_path(0, block.name)
    path.write_bytes(other.block_path(0, block.name).read_bytes())
    with pytest.raises(InputError, match="belongs to another run") as caught:
        started.load_block(block)
    assert "--resume" in caught.value.hint


def test_what_is_no_run_is_refused(tmp_path, started):
    with pytest.raises(InputError, match="not a run directory"):
        load_run(tmp_path / "nothing")
    (tmp_path / "run.json").write_text("{not json")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(InputError, match="schema version 99"):
        load_run(tmp_path)


def test_an_unfinished_run_says_how_far_it_is(started):
    finish_block(started, 0)
    with pytest.raises(InputError, match="1 of 3 blocks") as caught:
        load_run(started.path)
    assert "--resume" in caught.value.hint


def test_a_finished_run_keeps_its_metrics(started):
    started.finish(INFO, {"calibration_agreement": 0.5})
    assert read_info(started.path)["status"] == "complete"
    assert json.loads((started.path / "metrics.json").read_text()) == {"calibration_agreement": 0.5}
    with pytest.raises(InputError, match=r"float\.pt2 is missing"):
        load_run(started.path)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 4, 1), factor

    def forward(self, x):
        return (self.conv(x) * self.factor).mean([2, 3])


def test_graph_hash_sees_the_code_and_not_the_weights():
    hashes = [
        hash_graph(capture(trained(Scaled(f), seed), SIZE)) for f, seed in ((2.0, 0), (2.0, 1), (3.0, 0))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_graph_hash_sees_constants_of_the_code():
    """A tensor written into forward is in no state dict."""
    hashes = {hash_graph(capture(Scaled(torch.tensor(f)).eval(), SIZE)) for f in (2.0, 3.0)}
    assert len(hashes) == 2
