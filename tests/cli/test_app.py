"""The command line's contract: exit codes, streams, help, and no traceback for a user's mistake."""

import contextlib
import errno
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import typer

from metaaug_cli import __version__
from metaaug_cli.cli import app as app_module
from metaaug_cli.cli.app import main
from metaaug_cli.cli.console import Console, resume_hint
from metaaug_cli.errors import GateError, GraphError, InputError, MetaAugError, RecipeError, UsageError

COMMANDS = ["demo", "calibrate", "quantize", "evaluate", "export", "inspect"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "metaaug_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@pytest.fixture(autouse=True)
def _tracebacks_in_the_test_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def command(monkeypatch):
    """Install one command, ``metaaug go``, that runs the given function."""

    def install(function):
        fake = typer.Typer()
        fake.callback()(lambda: None)
        fake.command("go")(function)
        monkeypatch.setattr(app_module, "app", fake)

    return install


def raising(exc):
    def go():
        raise exc

    return go


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (GateError("1 of 2 gates missed: max-drop"), 1),
        (UsageError("--size x"), 2),
        (RecipeError("unknown key"), 2),
        (InputError("no image"), 2),
        (GraphError("cannot trace"), 3),
        (MetaAugError("the run failed"), 3),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "val"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (MemoryError(), 3),
        (ZeroDivisionError("division by zero"), 3),
        (SystemExit(5), 3),
        (SystemExit(0), 3),
    ],
)
def test_exit_codes(command, capsys, exc, code):
    command(raising(exc))
    assert main(["go"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_done_is_0(command):
    command(lambda: None)
    assert main(["go"]) == 0


def test_error_and_hint_stand_apart(command, capsys):
    command(raising(InputError("val has no images", hint="--data takes a folder of images")))
    main(["go"])
    expected = "error: val has no images\n\nhint: --data takes a folder of images\n"
    assert capsys.readouterr().err == expected


def test_an_unexpected_error_is_one_line_and_keeps_its_traceback(command, capsys):
    command(raising(RuntimeError("shape mismatch\nlots of detail")))
    assert main(["go"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: unexpected RuntimeError: shape mismatch\n\nhint: ")
    log = Path(re.search(r"the traceback is in\s+(\S+)", err).group(1))
    assert "Traceback" in log.read_text()
    assert "lots of detail" in log.read_text()
    log.unlink()


def test_an_unexpected_error_with_no_room_for_its_traceback(command, capsys, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    command(raising(RuntimeError("shape mismatch")))
    assert main(["go"]) == 3
    expected = "error: unexpected RuntimeError: shape mismatch\n\nhint: --debug shows the traceback\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(closed, tmp_path):
    code = (
        "import os, sys, typer\n"
        "from metaaug_cli.cli import app as m\n"
        "from metaaug_cli.cli.console import Console\n"
        "def show(fail: bool = False):\n"
        "    open(sys.argv[1], 'w').write(str(os.open(os.devnull, os.O_RDONLY)))\n"
        "    Console().result('88.44')\n"
        "    Console().note('done')\n"
        "    if fail: raise m.MetaAugError('broken')\n"
        "m.app.command('show')(show)\n"
        "sys.exit(m.main(sys.argv[2:]))\n"
    )
    opened = tmp_path / "opened"
    command = shlex.join([sys.executable, "-c", code, str(opened), "show"])
    script = f"{command} {closed}; first=$?; {command} --fail {closed}; exit $((10 * first + $?))"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert int(opened.read_text()) > 2  # no file of a run may stand where others print to


def test_an_error_for_a_reader_that_has_left_keeps_its_code():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "metaaug_cli", "nonsense"], stderr=writing, timeout=120)
    os.close(writing)
    assert done.returncode == 2


def test_a_report_of_another_suffix_is_told_how_to_be_written(capsys):
    assert main(["inspect", "x.onnx", "--json", "report.txt"]) == 2
    assert "hint: write --json=report.txt, or name a file that ends in .json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "go"], ["go", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(command, capsys, arguments):
    command(raising(RuntimeError("shape mismatch")))
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "metaaug-" not in err


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"]])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    command = shlex.join([sys.executable, "-m", "metaaug_cli", *arguments])
    script = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode in (0, 141)  # 0 when everything was written before the reader left
    assert result.stderr == ""


def test_results_for_a_reader_that_has_left(command, monkeypatch, capsys):
    def go():
        Console().result("88.44")

    reading, writing = os.pipe()
    os.close(reading)
    command(go)
    with os.fdopen(writing, "w") as stream, contextlib.suppress(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["go"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_second_sigterm_does_not_cut_the_answer_to_the_first_short(command, capsys):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    def error_and_again(self, message, hint=None, before=Console.error):
        os.kill(os.getpid(), signal.SIGTERM)
        before(self, message, hint=hint)

    command(stop)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Console, "error", error_and_again)
        assert main(["go"]) == 143
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_is_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["go"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted\n\nhint: ")


def test_ctrl_c_with_a_way_to_resume(command, capsys):
    def go():
        with resume_hint(lambda: "3 blocks are kept; add --resume"):
            raise KeyboardInterrupt

    command(go)
    assert main(["go"]) == 130
    assert "hint: 3 blocks are kept; add --resume" in capsys.readouterr().err


def test_a_real_ctrl_c(tmp_path):
    ready = tmp_path / "ready"
    code = (
        "import sys, time, typer\n"
        "from pathlib import Path\n"
        "from metaaug_cli.cli import app as m\n"
        "def wait():\n"
        f"    Path({str(ready)!r}).touch()\n"
        "    time.sleep(60)\n"
        "m.app.command('wait')(wait)\n"
        "sys.exit(m.main(['wait']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "error: interrupted" in err


def test_warnings_of_the_library_are_shown_others_only_with_debug(command, capsys):
    def go():
        logging.getLogger("metaaug_cli.calibration.data").warning("3 of 1024 files skipped")
        logging.getLogger("metaaug_cli.calibration.data").info("detail")
        warnings.warn("torch is chatty", UserWarning, stacklevel=1)

    command(go)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["go"]) == 0
        assert capsys.readouterr().err == "warning: 3 of 1024 files skipped\n"
        assert main(["go", "--debug"]) == 0
        err = capsys.readouterr().err
    assert "info: detail" in err
    assert "torch is chatty" in err
    assert logging.getLogger("metaaug_cli").handlers == []


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        (["evaluate", "--json", "runs/x"], ["evaluate", "--json", "-", "runs/x"]),
        (["evaluate", "runs/x", "--json"], ["evaluate", "runs/x", "--json", "-"]),
        (["evaluate", "--json", "-", "runs/x"], ["evaluate", "--json", "-", "runs/x"]),
        (["evaluate", "--json", "r.json", "runs/x"], ["evaluate", "--json", "r.json", "runs/x"]),
        (["evaluate", "--json", "--quiet"], ["evaluate", "--json", "-", "--quiet"]),
        (["evaluate", "--json=r.json"], ["evaluate", "--json=r.json"]),
    ],
)
def test_json_takes_a_file_or_nothing(given, completed):
    assert app_module._complete_json_flag(given) == completed


def test_version_and_bare_call():
    shown = run("--version")
    assert (shown.returncode, shown.stdout) == (0, f"metaaug {__version__}\n")
    bare = run()
    assert bare.returncode == 0
    assert "Usage: metaaug" in bare.stdout


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["--nonsense"], ["evaluate"], ["evaluate", "--nonsense"], ["quantize"]]
)
def test_usage_errors_are_2_with_a_hint_and_no_traceback(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "--help" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_every_command_and_the_exit_codes():
    text = run("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^│ {name} ", text, re.MULTILINE), name
    assert "1 a gate was missed" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_teaches_within_80_columns(name):
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    examples = [line for line in lines if line.strip().startswith("metaaug ")]
    assert examples, f"metaaug {name} --help shows no example"


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from metaaug_cli.cli.app import main\n"
        f"for name in {COMMANDS!r}: main([name, '--help'])\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_stdout_that_cannot_show_our_characters_is_no_error():
    result = run("--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
