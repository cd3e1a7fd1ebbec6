"""The ``metaaug`` command: registers every subcommand; ``main`` is the only error boundary."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Annotated, Any

import typer

from metaaug_cli import __version__
from metaaug_cli.cli import calibrate, demo, evaluate, export, quantize
from metaaug_cli.cli.console import Console, LogHandler, reserve_stdout
from metaaug_cli.errors import MetaAugError
from metaaug_cli.files import DISK_FULL

USAGE, FAILED, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 3, 130, 141, 143
_INPUT_ERRNOS = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST),
}

EPILOG = """\
[bold]Start here[/bold]
  metaaug demo                      the whole path on bundled data, offline

[bold]The usual path[/bold]
  metaaug quantize resnet18 --calib ./images --out runs/r18
  metaaug evaluate runs/r18 --data ./val
  metaaug export   runs/r18 -o r18.onnx

[bold]Exit codes[/bold]
  0 done    1 a gate was missed    2 usage or input is wrong
  3 the run failed                 130 interrupted (143 by SIGTERM)

metaaug COMMAND --help explains each command with examples."""

app = typer.Typer(
    name="metaaug",
    help="Quantize image classifiers after training, and export what was measured as ONNX.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"metaaug {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and the library's log. May stand anywhere."),
    ] = False,
) -> None:
    del show_version, debug  # both act before any command: one as a callback, one in main()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (demo, calibrate, quantize, evaluate, export):
    _command.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program name; the process's own by default.
    """
    # Spinning threads make a shared machine ten times slower; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter is no reason to stop
            stream.reconfigure(errors="replace")
    debug = "--debug" in arguments
    arguments = _complete_json_flag([item for item in arguments if item != "--debug"])
    json_on_stdout = any(pair == ("--json", "-") for pair in pairwise(arguments))
    output = reserve_stdout(until_exit=argv is None) if json_on_stdout else nullcontext()
    with _logging(debug=debug), output, _Signals(until_exit=argv is None) as signals:
        try:
            # Typer answers Ctrl-C and its own early exits with a code instead of an exception.
            code = app(args=arguments, prog_name="metaaug", standalone_mode=False)
        except (Exception, SystemExit) as exc:
            signals.ignore()
            code = _report(exc, arguments, debug=debug)
        else:
            if code == INTERRUPTED:
                signals.ignore()
                _show_error("interrupted", "the same command starts again from the beginning")
    if code == INTERRUPTED and signals.terminated:
        return TERMINATED
    return code if isinstance(code, int) else 0


def _replace_closed_streams() -> None:
    """Make a closed stdin, stdout or stderr the null device: a file opened later would get its number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


class _Signals:
    """SIGTERM, which schedulers send before they kill, ends a command as Ctrl-C does; both are answered.

    Args:
        until_exit: Whether signals stay ignored once one was answered, until the process is gone.
    """

    def __init__(self, *, until_exit: bool) -> None:
        self.until_exit, self.terminated, self.ignoring = until_exit, False, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            if self.before[signal.SIGTERM] is not signal.SIG_IGN:
                signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.until_exit and self.ignoring):
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        self.terminated = True
        raise KeyboardInterrupt

    def ignore(self) -> None:
        """Let no further signal interrupt."""
        self.ignoring = True
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)


def _complete_json_flag(arguments: list[str]) -> list[str]:
    """Give a bare ``--json`` its value ``-``, since an option cannot have an optional one."""
    completed: list[str] = []
    for index, item in enumerate(arguments):
        completed.append(item)
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if item == "--json" and following != "-" and not following.endswith(".json"):
            completed.append("-")
    return completed


def _report(exc: BaseException, arguments: Sequence[str], *, debug: bool) -> int:
    """Show an exception as ``error:`` and ``hint:`` and return the exit code it stands for."""
    if debug:
        with suppress(OSError):
            traceback.print_exception(exc)
    message, hint, code = _explain(exc, arguments)
    if code == FAILED and not (isinstance(exc, MetaAugError) or _is_full_disk(exc) or debug):
        hint = f"{hint}; " if hint else ""
        hint += _save_traceback(exc)
    if message:
        _show_error(message, hint)
    return code


def _show_error(message: str, hint: str | None) -> None:
    with suppress(OSError, SystemExit):  # Rich's answer to a stderr whose reader has left is exit(1)
        Console().error(message, hint=hint)


def _explain(exc: BaseException, arguments: Sequence[str]) -> tuple[str, str | None, int]:
    """Message, hint and exit code of an exception; an empty message when there is nothing to add."""
    if isinstance(exc, MetaAugError):
        return exc.message, exc.hint, exc.exit_code
    if isinstance(exc, typer.TyperException):
        return exc.format_message(), _usage_hint(exc, arguments), USAGE
    if isinstance(exc, BrokenPipeError) or isinstance(exc.__context__, BrokenPipeError):
        return "", None, BROKEN_PIPE
    if isinstance(exc, SystemExit):
        return f"something called exit({exc.code!r}) during the run", None, FAILED
    if isinstance(exc, OSError) and exc.errno in _INPUT_ERRNOS:
        where = f"{exc.filename}: " if exc.filename else ""
        return f"{where}{exc.strerror}", None, USAGE
    if _is_full_disk(exc):
        where = f": {exc.filename}" if exc.filename else ""  # type: ignore[attr-defined]
        return f"the disk is full{where}", "free some space, then run the same command again", FAILED
    if _is_out_of_memory(exc):
        return "out of memory", "use a smaller --batch, --cache-gb, --num or --size", FAILED
    detail = str(exc).strip().split("\n")[0] or "no message"
    return f"unexpected {type(exc).__name__}: {detail}", None, FAILED


def _usage_hint(exc: typer.TyperException, arguments: Sequence[str]) -> str:
    for flag, value, following in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if (flag, value) == ("--json", "-") and exc.format_message().endswith(f"({following})"):
            return f"write --json={following}, or name a file that ends in .json"
    context = getattr(exc, "ctx", None)
    command = context.command_path if context is not None else "metaaug"
    return f"{command} --help shows every option, with examples"


def _is_full_disk(exc: BaseException) -> bool:
    return isinstance(exc, OSError) and exc.errno in DISK_FULL


def _is_out_of_memory(exc: BaseException) -> bool:
    # torch has a class of its own for CUDA and a bare RuntimeError for the CPU.
    return (
        isinstance(exc, MemoryError)
        or type(exc).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(exc)
    )


def _save_traceback(exc: BaseException) -> str:
    """Keep the traceback where there is room for it; returns where it is to be seen."""
    try:
        handle, path = tempfile.mkstemp(prefix="metaaug-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            traceback.print_exception(exc, file=stream)
    except OSError:
        return "--debug shows the traceback"
    return f"the traceback is in {path} (--debug shows it here)"


@contextmanager
def _logging(*, debug: bool) -> Iterator[None]:
    """Show the library's warnings on stderr for the time of a command; with ``debug`` its whole log."""
    handler = LogHandler(logging.DEBUG if debug else logging.WARNING)
    loggers = [logging.getLogger("metaaug_cli")]
    if debug:
        loggers.append(logging.getLogger("py.warnings"))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
