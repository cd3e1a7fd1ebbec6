"""The demo runs the commands a user would type and hands on their exit code."""

import shlex
from pathlib import Path

import onnx
import pytest

import metaaug_cli.demo
from metaaug_cli.cli.app import main


def shown_commands(text: str) -> list[list[str]]:
    """The commands printed behind ``$``, continuation lines joined."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize(
    ("commands", "code", "shown"),
    [
        ([["--version"], ["--version"]], 0, 2),
        ([["--version"], ["no-such-command"], ["--version"]], 2, 2),
    ],
)
def test_the_first_failing_command_ends_the_demo_with_its_code(
    tmp_path, monkeypatch, capfd, commands, code, shown
):
    monkeypatch.setattr(metaaug_cli.demo, "demo_commands", lambda folder: commands)
    assert main(["demo", str(tmp_path / "demo")]) == code
    out, err = capfd.readouterr()
    assert shown_commands(out) == [["metaaug", *arguments] for arguments in commands[:shown]]
    assert ("`metaaug no-such-command` ended with exit code 2" in err) == (code == 2)


def test_a_folder_with_other_files_is_refused(tmp_path, capfd):
    (tmp_path / "mine.txt").touch()
    assert main(["demo", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "already holds files that are not a demo's" in " ".join(err.split())
    assert "hint: give the demo a new folder" in err


@pytest.mark.slow
def test_the_whole_demo_ends_with_accuracy_and_parity(tmp_path: Path, capfd):
    folder = tmp_path / "demo"
    assert main(["demo", str(folder)]) == 0
    out, _ = capfd.readouterr()
    assert [command[1] for command in shown_commands(out)] == ["quantize", "export", "evaluate"]
    (exported,) = folder.glob("*.onnx")
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    last = out.rpartition("$ metaaug evaluate")[2]
    assert "top-1" in last
    assert "parity" in last.lower()
