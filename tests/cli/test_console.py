"""What is printed where: streams, width, colour, progress and JSON."""

import errno
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from metaaug_cli.cli import console as console_module
from metaaug_cli.cli.console import (
    Column,
    Console,
    InterruptedRunError,
    LogHandler,
    format_seconds,
    listed,
    reserve_stdout,
    resume_hint,
)
from metaaug_cli.errors import InputError, MetaAugError, UsageError

LONG_PATH = "/a/very/long/path/" + "x" * 90 + "/file.onnx"


def show_everything(console):
    console.note("a note")
    console.warn("a warning")
    console.table("Plan", ["block"], [["layer1"]], detail=True)
    console.table("Accuracy", ["network", "top-1"], [["float", "88.44"], ["simulated", None]])
    console.result("18 of 20 nodes run as integers")
    console.verdict(True, "max-drop: fine")
    console.data({"top1": 0.8844})


def test_results_on_stdout_the_rest_on_stderr(capsys):
    show_everything(Console())
    out, err = capsys.readouterr()
    for part in ("Accuracy", "88.44", "18 of 20", "PASS  max-drop"):
        assert part in out
        assert part not in err
    for part in ("a note", "warning: a warning", "layer1"):
        assert part in err
        assert part not in out
    assert "0.8844" not in out + err
    assert re.search(r"simulated +-\s", out)


def test_quiet_keeps_results_and_warnings(capsys):
    show_everything(Console(quiet=True))
    out, err = capsys.readouterr()
    assert "88.44" in out
    assert err == "warning: a warning\n"


@pytest.mark.parametrize("flag", [True, "-"])
def test_json_has_stdout_for_itself(capsys, flag):
    show_everything(Console(json=flag))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"top1": 0.8844}
    assert "88.44" in err
    assert "PASS" in err


def test_json_into_a_file_leaves_the_terminal_as_it_is(capsys, tmp_path):
    path = tmp_path / "report.json"
    show_everything(Console(json=str(path)))
    assert json.loads(path.read_text()) == {"top1": 0.8844}
    assert "88.44" in capsys.readouterr().out
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_what_a_users_model_prints_cannot_spoil_the_json(capsys):
    with reserve_stdout():
        print("hello from model.py")  # noqa: T201
        Console(json=True).data([1, 2])
    out, err = capsys.readouterr()
    assert json.loads(out) == [1, 2]
    assert "hello" in err


def test_nor_can_what_it_prints_past_python_or_in_a_process_it_starts(capfd):
    with reserve_stdout():
        os.write(1, b"from compiled code\n")
        subprocess.run(["echo", "from a process"], check=True)
        Console(json=True).data([1, 2])
    os.write(1, b"afterwards\n")
    out, err = capfd.readouterr()
    assert out == "[\n  1,\n  2\n]\nafterwards\n"
    assert err == "from compiled code\nfrom a process\n"


def test_a_stdout_that_is_no_file_keeps_the_json(monkeypatch):
    class Tee:
        written = ""

        def write(self, text):
            self.written += text

        def flush(self):
            pass

    tee = Tee()
    monkeypatch.setattr(sys, "stdout", tee)
    with reserve_stdout():
        print("hello from model.py")  # noqa: T201
        Console(json=True).data([1, 2])
    assert json.loads(tee.written) == [1, 2]


def test_what_compiled_code_held_back_does_not_follow_the_json():
    code = (
        "import ctypes\n"
        "from metaaug_cli.cli.console import Console, reserve_stdout\n"
        "with reserve_stdout(until_exit=True):\n"
        "    ctypes.CDLL(None).printf(b'held back\\n')\n"
        "    Console(json=True).data([1, 2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [1, 2]
    assert done.stderr == "held back\n"


def test_a_list_names_five_and_keeps_a_line_for_each():
    assert listed("files", ["a\nb", "c"]) == "2 files:\na\\nb\nc"
    assert listed("files", [str(i) for i in range(7)]).splitlines()[-2:] == ["4", "and 2 more"]


def test_json_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="JSON"):
        Console(json=True).data({"nll": float("nan")})


def test_eighty_columns_and_unbroken_paths(capsys):
    console = Console()
    prose = "the quick brown fox jumps over the lazy dog " * 6
    console.note(prose)
    console.warn(prose)
    console.error(prose, hint=prose)
    console.result(prose)
    console.verdict(False, prose)
    console.table(
        prose, ["layer", *("column" + str(i) for i in range(6))], [["layer4.1.conv2." * 4, *"123456"]]
    )
    out, err = capsys.readouterr()
    assert max(len(line) for line in (out + err).splitlines()) <= 80
    console.note(f"written to {LONG_PATH} just now")
    assert LONG_PATH in capsys.readouterr().err


def test_a_command_to_type_stays_in_one_line_and_prose_does_not(capsys):
    command = "metaaug quantize resnet18 --calib " + " ".join(f"images/{i}" for i in range(20)) + " --resume"
    prose = "metaaug quantizes image classifiers " + "and says so in words " * 6
    Console().error("interrupted", hint=f"{prose}; continue with\n{command}")
    lines = capsys.readouterr().err.splitlines()
    assert f"  {command}" in lines
    assert all(len(line) <= 80 for line in lines if command not in line)


def test_markup_in_names_is_shown_as_it_is(capsys):
    console = Console()
    console.table("[bold]x", ["[red]name"], [["conv[0]"], ["[/]"]])
    console.note("see runs/[a]")
    out, err = capsys.readouterr()
    assert "[bold]x" in out
    assert "[red]name" in out
    assert "conv[0]" in out
    assert "[/]" in out
    assert "runs/[a]" in err


def test_columns_can_be_left_justified(capsys):
    Console().table("T", ["a", Column("why", "left")], [["x", "short"], ["y", "a longer reason"]])
    assert re.search(r"x +short {4,}", capsys.readouterr().out)


def test_error_and_hint(capsys):
    Console().error("no such folder: ./val", hint="--data takes a folder")
    assert capsys.readouterr().err == "error: no such folder: ./val\n\nhint: --data takes a folder\n"


def test_plain_progress_shows_every_step_of_a_few(capsys):
    with Console().progress("block") as tick:
        for done in range(1, 4):
            tick(done, 3, f"layer{done}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["block 1/3", "block 2/3", "block 3/3"]
    assert lines[0].endswith("0 s left, layer1")
    assert "left" not in lines[-1]


def test_plain_progress_of_many_steps_is_about_ten_lines(capsys):
    with Console().progress("evaluate") as tick:
        for done in range(64, 5001, 64):
            tick(min(done, 5000), 5000)
        tick(5000, 5000)
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 12
    assert lines[-1].startswith("evaluate 5000/5000")


def test_plain_progress_of_slow_steps_says_it_is_alive(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(console_module.time, "monotonic", lambda: float(next(clock)))
    with Console().progress("iterations") as tick:
        for done in range(1, 9):
            tick(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "iterations 2/1000, 40 s, 5 h 32 min left"


def test_other_work_under_the_same_label_gets_a_clock_of_its_own(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(console_module.time, "monotonic", lambda: float(next(clock)))
    with Console().progress("quantizing") as tick:
        tick(600, 600, "making images")
        tick(1, 200, "block 1/2")  # the clock starts here
        tick(2, 200, "block 1/2")
    assert capsys.readouterr().err.splitlines() == [
        "quantizing 600/600, 1 min 40 s, making images",
        "quantizing 1/200, 0 s, block 1/2",
        "quantizing 2/200, 1 min 40 s, 2 h 45 min left, block 1/2",
    ]


def test_quiet_progress_prints_nothing(capsys):
    with Console(quiet=True).progress("block") as tick:
        tick(1, 1)
    assert capsys.readouterr() == ("", "")


def test_library_warnings_are_shown_and_the_rest_is_not(capsys):
    handler = LogHandler(logging.WARNING)
    logger = logging.getLogger("metaaug_cli.test_console")
    logger.addHandler(handler)
    try:
        logger.warning("3 files skipped")
        logger.warning("%d files skipped", 3)
        logger.info("not shown")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "warning: 3 files skipped\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (3780, "1 h 03 min")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_ctrl_c_says_how_to_go_on():
    with pytest.raises(InterruptedRunError) as caught, resume_hint(lambda: "metaaug quantize --resume"):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert caught.value.hint == "metaaug quantize --resume"


def test_a_report_for_a_folder_that_is_missing(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        Console(json=str(tmp_path / "no" / "report.json"))


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match="cannot be written into"):
        Console(json=str(tmp_path / "report.json"))


def test_a_full_disk_says_how_to_go_on():
    with pytest.raises(MetaAugError, match="the disk is full") as caught, resume_hint(lambda: "add --resume"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 3
    assert caught.value.hint == "free some space; add --resume"
    with pytest.raises(FileNotFoundError), resume_hint(lambda: "add --resume"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def in_terminal(code, **environment):
    """Run Python code with stdout and stderr on a pseudo-terminal and return all it printed."""
    parent, child = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**clean, "TERM": "xterm-256color", **environment},
    )
    os.close(child)
    chunks = []
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(parent)
    assert process.wait() == 0
    return b"".join(chunks).decode()


COLOURED = re.compile(r"\x1b\[(?:\d+;)*3[0-9]")
SHOW = """
from metaaug_cli.cli.console import Console
console = Console()
console.verdict(False, "parity: layer3.0.conv1 leaves tolerance")
console.error("it is broken", hint="repair it")
with console.progress("block") as outer:
    outer(1, 2, "layer1")
    with console.progress("iterations") as inner:
        inner(900, 1000)
        inner(50, 100)
        console.note("a note above the bars")
"""


def test_colour_on_a_terminal_but_not_with_no_color():
    assert COLOURED.search(in_terminal(SHOW))
    plain = in_terminal(SHOW, NO_COLOR="1")
    assert not COLOURED.search(plain)
    assert "FAIL" in plain
    assert "error:" in plain


def test_a_terminal_gets_bars_with_time_left_and_notes_above_them():
    shown = in_terminal(SHOW)
    assert "50%" in shown
    assert "layer1" in shown
    assert "a note above the bars" in shown
    assert "block 1/2" not in shown


def test_a_dumb_terminal_gets_lines():
    assert "block 1/2" in in_terminal(SHOW, TERM="dumb")


def test_progress_costs_little(capsys):
    with Console().progress("iterations") as tick:
        start = time.perf_counter()
        for done in range(20_000):
            tick(done, 20_000)
        assert time.perf_counter() - start < 1.0
