"""The whole method on a small network: golden losses, repeatability, memory budgets, interruption and resume.

After a change of the method that is meant to change the losses, write them anew:
``PYTHONPATH=tests python tests/golden/test_pipeline.py``.
"""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_run import (
    BLOCKS,
    KILLED,
    PREPROCESSING,
    TESTS,
    Recorder,
    block_files,
    calibration,
    exported,
    model,
    recipe,
)
from networks import SIZE, ResidualNet, images, trained

from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.errors import RecipeError, UsageError
from metaaug_cli.pipeline import pick_device, quantize
from metaaug_cli.runs.finished import load_run

GOLDEN = Path(__file__).with_name("losses.json")


def losses_of(result):
    """Reconstruction loss of every step, by block."""
    pairs = zip(result.chain.blocks, result.histories, strict=True)
    return {block.name: [loss for _, loss in history.curve] for block, history in pairs}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One complete run: (directory, result, what progress saw)."""
    torch.set_num_threads(1)
    folder, recorder = tmp_path_factory.mktemp("golden") / "run", Recorder()
    result = quantize(
        model(), calibration(), recipe=recipe(), run_dir=folder, device="cpu", progress=recorder
    )
    return folder, result, recorder


def test_losses_are_the_golden_ones(finished):
    _, result, _ = finished
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(golden) == BLOCKS
    for name, losses in losses_of(result).items():
        assert len(losses) == 20
        assert losses == pytest.approx(golden[name], rel=1e-4, abs=1e-6), name


def test_the_result_is_better_than_nearest_rounding(finished):
    _, result, _ = finished
    nearest = quantize(
        exported(), calibration(), recipe=recipe("reconstruction.method=nearest"), device="cpu"
    )
    x = calibration().images
    expected = result.float_module(x)
    errors = [float((m.deployed(x) - expected).square().mean()) for m in (result, nearest)]
    assert errors[0] < 0.8 * errors[1]
    assert all(h.loss_after == h.loss_before for h in nearest.histories)


def test_the_float_module_is_the_users_network(finished):
    _, result, _ = finished
    x = calibration().images
    with torch.no_grad():
        torch.testing.assert_close(result.float_module(x), model().module(x), rtol=1e-4, atol=1e-4)


def test_progress_hears_of_every_step_and_block(finished):
    _, _, recorder = finished
    assert recorder.plan == (5, 20)
    assert recorder.steps == [(name, i, 20) for name in BLOCKS for i in range(1, 21)]
    assert recorder.blocks == [(name, False) for name in BLOCKS]


def test_the_run_directory_gives_the_result_back(finished):
    folder, result, _ = finished
    names = {p.name for p in folder.iterdir()}
    assert names == {"run.json", "recipe.yaml", "float.pt2", "blocks", "metrics.json"}
    run = load_run(folder)
    assert (run.num_outputs, run.input_size, run.preprocessing) == (5, SIZE, PREPROCESSING)
    assert run.recipe.model_dump(exclude={"name"}) == recipe().model_dump(exclude={"name"})
    x = images(6, seed=9)
    assert torch.equal(run.deployed_module(x), result.deployed(x))
    assert torch.equal(run.float_module(x), result.float_module(x))
    bits = run.manifest().weight_bits
    assert bits["stem.0"] == bits["fc"] == 8
    assert {bits[name] for name in bits.keys() - {"stem.0", "fc"}} == {2}


def test_metrics_are_measured_on_the_calibration_images(finished):
    _, result, _ = finished
    x = calibration().images
    same = result.float_module(x).argmax(1) == IntegerSimulation(result.deployed)(x).argmax(1)
    assert result.metrics["calibration_agreement"] == pytest.approx(float(same.float().mean()))
    assert result.metrics["calibration_agreement_images"] == 48
    assert list(result.metrics["blocks"]) == BLOCKS
    for block, history in zip(BLOCKS, result.histories, strict=True):
        assert result.metrics["blocks"][block]["loss_after"] == history.loss_after


def test_a_second_run_gives_the_same_bytes(finished, tmp_path):
    folder, _, _ = finished
    quantize(exported(), calibration(), recipe=recipe("name=other"), run_dir=tmp_path / "again", device="cpu")
    assert block_files(tmp_path / "again") == block_files(folder)


def test_another_seed_gives_another_result(finished):
    _, result, _ = finished
    other = quantize(exported(), calibration(), recipe=recipe("seed=1"), device="cpu")
    assert other.histories[1].curve != result.histories[1].curve


def test_without_room_everything_is_recomputed_to_the_same_result(finished, caplog):
    _, result, _ = finished
    with caplog.at_level("WARNING", logger="metaaug_cli"):
        tight = quantize(exported(), calibration(), recipe=recipe(), device="cpu", cache_gb=0)
    assert sum("recomputed each step" in r.message for r in caplog.records) == 5
    for block, other in zip(result.chain.blocks, tight.chain.blocks, strict=True):
        state, again = block.state(), other.state()
        for key, value in state.items():
            if key.endswith("codes"):
                assert float((value != again[key]).float().mean()) <= 0.01, key
            else:
                torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-7)
    assert [h.loss_after for h in tight.histories] == pytest.approx(
        [h.loss_after for h in result.histories], rel=0.02
    )


def test_room_for_some_blocks_only_gives_the_same_result(finished, caplog):
    _, result, _ = finished
    bytes_of_stem = 48 * 4 * (2 * 192 + 384)  # the stem and the first residual block do not fit below this
    with caplog.at_level("WARNING", logger="metaaug_cli"):
        some = quantize(
            exported(), calibration(), recipe=recipe(), device="cpu", cache_gb=(bytes_of_stem - 4) / 2**30
        )
    assert 0 < sum("recomputed each step" in r.message for r in caplog.records) < 5
    assert [h.loss_after for h in some.histories] == pytest.approx(
        [h.loss_after for h in result.histories], rel=0.02
    )


@pytest.mark.parametrize(("point", "done"), [("inside a block", 2), ("between the two files of a block", 3)])
def test_a_killed_run_resumes_to_the_same_bytes(finished, tmp_path, point, done):
    complete, result, _ = finished
    run = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(TESTS), str(run), point],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert len(list((run / "blocks").glob("*.json"))) == done
    written = {p: p.stat().st_mtime_ns for p in (run / "blocks").glob("00[01]*")}
    assert len(written) == 4

    recorder = Recorder()
    resumed = quantize(
        exported(), calibration(), recipe=recipe(), run_dir=run, resume=True, device="cpu", progress=recorder
    )
    assert recorder.blocks == [(name, i < done) for i, name in enumerate(BLOCKS)]
    assert {name for name, _, _ in recorder.steps} == set(BLOCKS[done:])
    assert {p: p.stat().st_mtime_ns for p in written} == written, "finished blocks are not written again"
    assert block_files(run) == block_files(complete)
    assert torch.equal(resumed.deployed(images(4)), result.deployed(images(4)))
    assert json.loads((run / "run.json").read_text())["status"] == "complete"


def test_resuming_a_finished_run_learns_nothing(finished):
    folder, result, _ = finished
    before, recorder = block_files(folder), Recorder()
    again = quantize(
        exported(),
        calibration(),
        recipe=recipe(),
        run_dir=folder,
        resume=True,
        device="cpu",
        progress=recorder,
    )
    assert recorder.steps == []
    assert recorder.blocks == [(name, True) for name in BLOCKS]
    assert block_files(folder) == before
    assert torch.equal(again.deployed(images(4)), result.deployed(images(4)))


def test_holding_back_every_image_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecipeError, match="leave none to learn from"):
        quantize(
            exported(),
            calibration(),
            recipe=recipe("calibration.holdout=48"),
            run_dir=tmp_path / "run",
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


def test_the_greatest_seed_is_a_seed_like_any_other():
    settings = [f"seed={2**63 - 1}", "reconstruction.method=nearest"]
    assert quantize(exported(), calibration(), recipe=recipe(*settings), device="cpu").histories


class OtherCode(ResidualNet):
    def forward(self, x):
        return 2 * super().forward(x)


def other_code():
    network = trained(OtherCode())
    return replace(model(), module=network)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"recipe": lambda: recipe("reconstruction.iterations=21", "seed=1")},
            "the recipe (seed: 0 -> 1, reconstruction.iterations: 20 -> 21)",
        ),
        (
            {"recipe": lambda: recipe("quantization.placement=academic")},
            "the recipe (quantization.placement: integer -> academic)",
        ),
        ({"model": lambda: model(seed=5)}, "the model's weights"),
        ({"model": other_code}, "the model's code"),
        ({"calibration": lambda: calibration(seed=5)}, "the calibration set"),
    ],
)
def test_a_changed_run_is_not_resumed(finished, changes, said):
    folder, _, _ = finished
    made = {"model": exported, "calibration": calibration, "recipe": recipe} | changes
    before = block_files(folder)
    with pytest.raises(RecipeError) as caught:
        quantize(
            made["model"](),
            made["calibration"](),
            recipe=made["recipe"](),
            run_dir=folder,
            resume=True,
            device="cpu",
        )
    assert f": {said} changed since" in caught.value.message
    assert block_files(folder) == before


def test_a_taken_directory_is_not_overwritten(finished):
    folder, _, _ = finished
    with pytest.raises(UsageError, match="already holds a run"):
        quantize(exported(), calibration(), recipe=recipe(), run_dir=folder, device="cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        pick_device("cuda")
    with pytest.raises(UsageError, match="'mps' is not a device"):
        pick_device("mps")
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_every_method_beats_nearest_rounding(method):
    settings = ["quantization.act_bits=4", "reconstruction.iterations=60", "reconstruction.start=nearest"]
    result = quantize(
        exported(), calibration(), recipe=recipe(*settings, f"reconstruction.method={method}"), device="cpu"
    )
    before = sum(h.loss_before for h in result.histories[1:-1])
    after = sum(h.loss_after for h in result.histories[1:-1])
    assert after < 0.9 * before
    assert len(result.chain.blocks) == (9 if method == "adaround" else 5)


def test_gptq_learns_nothing_and_comes_nearer_to_float_than_nearest_rounding():
    calib, errors = calibration(), {}
    for method in ("nearest", "gptq"):
        settings = [f"reconstruction.method={method}", "quantization.act_bits=8"]
        result = quantize(exported(), calib, recipe=recipe(*settings), device="cpu")
        with torch.no_grad():
            exact, found = result.float_module(calib.images), result.deployed(calib.images)
        errors[method] = float((exact - found).square().mean())
        assert all(h.loss_before == h.loss_after and not h.curve for h in result.histories)
    assert errors["gptq"] < 0.7 * errors["nearest"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = losses_of(quantize(model(), calibration(), recipe=recipe(), device="cpu"))
    GOLDEN.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
