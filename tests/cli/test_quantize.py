"""``metaaug quantize`` on the demo's network and digits, as a user runs it."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from quantize_command import LEARNED, command, flat

from metaaug_cli import demo
from metaaug_cli.cli.app import main
from metaaug_cli.deployment.simulation import IntegerSimulation
from metaaug_cli.runs.artifacts import LOG_FILE, RUN_FILE, RunDirectory, read_info
from metaaug_cli.runs.finished import load_run

COMMAND = [sys.executable, "-m", "metaaug_cli"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def finished(digits):
    """One run in a process of its own: (completed process, run directory)."""
    out = digits / "run"
    done = subprocess.run(
        [*COMMAND, *command(digits, out=out)], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done, out


def test_made_images_are_learned_from_beside_the_others(digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert planned_synthesis(digits, capsys) > 0
    assert main(command(digits, "--synthetic", "4", out=out)) == 0
    shown = capsys.readouterr()
    assert "4 images from the network's batch norms" in flat(shown.err)
    assert "on 44 calibration images" in flat(shown.out)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["calibration"]["synthetic"] == 4
    assert planned_synthesis(digits, capsys) == 0.0  # they are kept


def planned_synthesis(digits, capsys):
    assert main(command(digits, "--synthetic", "4", "--plan", "--json")) == 0
    return json.loads(capsys.readouterr().out)["synthesis_seconds"]


def test_the_run_says_what_it_did_and_what_comes_next(finished):
    done, out = finished
    assert "W4A4 genie, integer placement" in flat(done.stdout)
    run = load_run(out)
    for block in run.info["blocks"]:
        assert block in done.stdout
    assert "top-1 agreement with float on 40 calibration images" in flat(done.stdout)
    shown = done.stdout + done.stderr
    assert f"metaaug evaluate {out}" in flat(shown).replace("- ", "-") or "metaaug evaluate" in flat(shown)
    assert "Traceback" not in shown
    assert max(map(len, done.stdout.replace(str(out), "").splitlines())) <= 80


def test_the_table_shows_the_measured_losses(finished):
    done, out = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["blocks"]) == 7
    for name, block in metrics["blocks"].items():
        (line,) = [text for text in done.stdout.splitlines() if text.split()[:1] == [name]]
        assert f"{block['loss_before']:.4g}" in line
        assert f"{block['loss_after']:.4g}" in line


def test_the_run_directory_is_complete(finished):
    _, out = finished
    names = {p.name for p in out.iterdir()}
    assert {"run.json", "recipe.yaml", "float.pt2", "blocks", "metrics.json", "log.txt"} <= names
    info = read_info(out)
    assert info["status"] == "complete"
    assert info["model"] == "digits_cnn.digits_cnn"
    assert info["command"].startswith("metaaug quantize ")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["quantization"]["weight_bits"] == 4
    assert recipe["reconstruction"]["iterations"] == 8
    assert len(list((out / "blocks").iterdir())) == 2 * len(info["blocks"]) == 14
    assert "block body.0" in (out / "log.txt").read_text()


def test_the_quantized_network_still_reads_digits(finished):
    _, out = finished
    run = load_run(out)
    _, test = demo.load_digits_split()
    pixels = torch.from_numpy(test.images[:200]).float()[:, None] / 255
    x, labels = (pixels - demo.MEAN) / demo.STD, torch.from_numpy(test.labels[:200])
    with torch.no_grad():
        versions = (run.float_module, IntegerSimulation(run.deployed_module))
        accuracy = [float((m(x).argmax(1) == labels).float().mean()) for m in versions]
    assert accuracy[0] > 0.95
    assert accuracy[1] > accuracy[0] - 0.05


def test_json_is_all_there_is_on_stdout(digits, tmp_path, capfd):
    arguments = command(digits, "--method", "nearest", "--json", out=tmp_path / "run")
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    data = json.loads(out)
    assert data["run"] == str(tmp_path / "run")
    assert 0 <= data["calibration_agreement"] <= 1
    assert len(data["blocks"]) == 7
    assert err


def test_without_learning_there_is_one_error_to_show(digits, tmp_path, capfd):
    assert main(command(digits, "--method", "nearest", out=tmp_path / "run")) == 0
    out, err = capfd.readouterr()
    (head,) = [line for line in out.splitlines() if line.startswith("block ")]
    assert head.split() == ["block", "error"]
    assert "stem.0: error" in err
    assert "->" not in err


def test_a_learned_augmenter_is_shown_and_its_trouble_told(digits, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(command(digits, *LEARNED, out=out)) == 0
    stdout, stderr = capfd.readouterr()
    (head,) = [line for line in stdout.splitlines() if line.startswith("block ")]
    assert head.split() == ["block", "before", "after", "held", "back", "T's", "distance"]
    rows = {line.split()[0]: line.split()[1:] for line in stdout.splitlines() if len(line.split()) == 5}
    assert len(rows) == 7
    for name, (*_, held_back, distance) in rows.items():
        assert float(held_back) > 0
        assert (distance == "-") == (name in ("stem.0", "head"))
    page = out / "augmentation" / "index.html"
    assert f"what the augmenter did: {page}".replace(" ", "") in "".join(stderr.split())
    assert "7 of 7 blocks" in page.read_text()
    # Two steps from the identity are next to nothing.
    assert "warning: block body.0: the augmenter has collapsed to the identity" in flat(stderr)
    assert "the augmenter has collapsed to the identity" in (out / "log.txt").read_text()


def test_without_an_augmenter_nothing_is_said_of_one(finished):
    done, out = finished
    assert "held back" not in done.stdout
    assert "augmenter" not in done.stdout + done.stderr
    assert not (out / "augmentation").exists()


def test_without_out_the_run_has_a_name_of_its_own(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    base = Path("runs") / "digits_cnn.digits_cnn-w4a4"
    foreign, failed = base / "notes.md", Path(f"{base}-3") / LOG_FILE
    for file in (foreign, Path(f"{base}-2") / RUN_FILE, failed):
        file.parent.mkdir(parents=True)
        file.write_text("earlier\n")
    assert main(command(digits, "--method", "nearest")) == 0
    assert f"run directory: {base}-3" in capfd.readouterr().out
    assert read_info(failed.parent)["status"] == "complete"
    assert failed.read_text().startswith("earlier\n")
    assert list(base.iterdir()) == [foreign]
    assert [p.name for p in Path(f"{base}-2").iterdir()] == [RUN_FILE]

    before = (failed.parent / "metrics.json").stat().st_mtime_ns
    assert main(command(digits, "--method", "nearest", "--resume")) == 0
    assert f"run directory: {base}-3" in capfd.readouterr().out
    assert (failed.parent / "metrics.json").stat().st_mtime_ns > before
    assert not Path(f"{base}-4").exists()


def test_runs_that_go_at_the_same_time_keep_apart(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    base = Path("runs") / "digits_cnn.digits_cnn-w4a4"
    with RunDirectory(base).claim(resume=False):
        assert main(command(digits, "--method", "nearest", out=base)) == 2
        shown = flat(capfd.readouterr().err)
        assert f"another run is being written into {base}" in shown
        assert "hint: wait until it has ended, or choose another --out" in shown
        assert main(command(digits, "--method", "nearest")) == 0
    assert f"run directory: {base}-2" in capfd.readouterr().out
    assert [p.name for p in base.iterdir()] == [LOG_FILE]
    with RunDirectory(Path(f"{base}-2")).claim(resume=True):
        assert main(command(digits, "--method", "nearest", "--resume")) == 2
    assert "another run is being written" in flat(capfd.readouterr().err)


def test_a_disk_that_fills_up_names_the_command_that_continues(digits, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, arguments = tmp_path / "run", command(digits, "--method", "nearest", out=tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["metaaug", *arguments])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunDirectory, "save_block", full)
        assert main(arguments) == 3
    err = capfd.readouterr().err
    assert "error: the disk is full" in err
    assert f"  metaaug {shlex.join(arguments)} --resume" in err.splitlines()
    assert main([*arguments, "--resume"]) == 0
    assert read_info(out)["status"] == "complete"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_a_log_that_cannot_be_written_is_no_error(digits, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOG_FILE).symlink_to("/dev/full")
    assert main(command(digits, "--method", "nearest", out=tmp_path / "run")) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_resume_where_nothing_was_begun_starts_afresh_and_says_so(digits, tmp_path, capfd):
    out = tmp_path / "new"
    assert main(command(digits, "--method", "nearest", "--resume", out=out)) == 0
    assert flat(capfd.readouterr().err).count("there is no run in") == 1
    assert read_info(out)["status"] == "complete"
    assert main(command(digits, "--method", "nearest", "--resume", out=out)) == 0
    assert "there is no run in" not in flat(capfd.readouterr().err)


def test_a_taken_directory_names_resume(finished, digits, capfd):
    _, out = finished
    assert main(command(digits, out=out)) == 2
    err = flat(capfd.readouterr().err)
    assert "already holds a run" in err
    assert "hint: continue it with --resume" in err


@pytest.mark.parametrize(
    ("change", "said"),
    [(["--seed", "3"], "the recipe"), (["--num", "30"], "the calibration set")],
)
def test_resuming_a_changed_run_says_what_changed(finished, digits, capfd, change, said):
    _, out = finished
    assert main(command(digits, *change, "--resume", out=out)) == 2
    assert said in flat(capfd.readouterr().err)


def test_resume_of_a_finished_run_learns_nothing(finished, digits, capfd):
    _, out = finished
    before = {p.name: p.stat().st_mtime_ns for p in (out / "blocks").iterdir()}
    assert main(command(digits, "--resume", out=out)) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (out / "blocks").iterdir()} == before
    assert capfd.readouterr().err.count("resumed") == 7


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (["--wbits", "9"], 2, "--wbits: "),
        (["--set", "reconstruction.iterashuns=3"], 2, "iterations"),
        (["--recipe", "w4a5"], 2, "no recipe named 'w4a5'"),
        (["--device", "tpu"], 2, "--device tpu is not a device"),
        (["--calib", "nowhere"], 2, "nowhere"),
        (["--size", "0"], 2, "0"),
        (["--method", "magic"], 2, "--method: "),
        (["--holdout", "-1"], 2, "--holdout"),
        (["--resume"], 2, "there is no run"),
    ],
)
def test_mistakes_end_with_code_2_before_anything_is_written(
    digits, tmp_path, monkeypatch, capfd, extra, code, said
):
    monkeypatch.chdir(tmp_path)
    assert main(command(digits, *extra)) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert said in flat(captured.err)
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced_names_the_line_and_ends_with_code_3(digits, tmp_path, capfd):
    source = tmp_path / "net.py"
    source.write_text(
        "from torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(1, 10, 8)\n\n"
        "    def forward(self, x):\n"
        "        if x.mean() > 0:\n"
        "            x = -x\n"
        "        return self.conv(x).flatten(1)\n"
    )
    arguments = command(digits, out=tmp_path / "run")
    arguments[1:4] = [f"{source}:Net", "--weights", "random"]
    assert main(arguments) == 3
    err = capfd.readouterr().err
    assert "net.py:10" in flat(err).replace(" ", "")
    assert "Traceback" not in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOG_FILE]


def test_ctrl_c_keeps_finished_blocks_and_names_the_command_that_continues(digits, tmp_path):
    out = tmp_path / "run"
    arguments = command(digits, "--set", "reconstruction.iterations=400", out=out)
    running = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        for line in running.stderr:
            if line.startswith("block 1/7"):
                break
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        running.stdout.read()
        assert running.wait(timeout=60) == 130
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
        running.stderr.close()
    assert "--resume" in rest
    assert f"--out {out}".replace(" ", "") in "".join(rest.split())
    assert read_info(out)["status"] == "running"
    finished = len(list((out / "blocks").glob("*.json")))
    assert finished >= 1
    assert f"{finished} finished block" in rest
