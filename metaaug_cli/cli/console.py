"""How commands print: results on stdout, everything else on stderr, readable in 80 columns.

On a terminal progress is a bar with the time left; anywhere else (a CI log, a pipe) it is now and then
one plain line. Meaning never rests on colour alone, and ``NO_COLOR`` is respected.
"""

import json as jsonlib
import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from metaaug_cli.errors import MetaAugError, UsageError
from metaaug_cli.files import DISK_FULL, require_report_place, write_atomically

WIDTH = 80
_PLAIN_STEPS = 10
_PLAIN_SECONDS = 30.0
_FEW_STEPS = 20
_LISTED = 5
_COMMAND = re.compile(r"\s*(next: )?metaaug (calibrate|quantize|evaluate|export|inspect|demo) ")
_DATA_STREAM: ContextVar[TextIO | None] = ContextVar("data_stream", default=None)


class ProgressCallback(Protocol):
    """Called with the work done, the total, and optionally what is being worked on."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


@dataclass(frozen=True)
class Column:
    """One table column; numbers are usually right-justified, names left."""

    title: str
    justify: Literal["left", "right"] = "right"


class InterruptedRunError(MetaAugError):
    """Ctrl-C, with what to do next; raised by :func:`resume_hint`."""

    exit_code = 130


@contextmanager
def resume_hint(hint: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C and a full disk inside the block into an error that says how to continue.

    Args:
        hint: Gives what was kept by then, and the command that goes on from there.
    """
    try:
        yield
    except KeyboardInterrupt as exc:
        raise InterruptedRunError("interrupted", hint=hint()) from exc
    except OSError as exc:
        if exc.errno not in DISK_FULL:
            raise
        raise MetaAugError("the disk is full", hint=f"free some space; {hint()}") from exc


@contextmanager
def reserve_stdout(*, until_exit: bool = False) -> Iterator[None]:
    """Keep stdout for :meth:`Console.data`; what else prints goes to stderr.

    A user's model may print with ``print``, from compiled code, or from a process it starts.

    Args:
        until_exit: Keep it so for the rest of the process, at whose end compiled code prints what it held
            back.
    """
    printed = sys.stdout
    printed.flush()
    is_descriptor = _is_descriptor(printed, 1)
    kept = os.dup(1)
    os.dup2(2, 1)
    stream = os.fdopen(os.dup(kept), "w", encoding="utf-8") if is_descriptor else printed
    token = _DATA_STREAM.set(stream)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _DATA_STREAM.reset(token)
        printed.flush()
        if not until_exit:
            os.dup2(kept, 1)
        os.close(kept)
        if is_descriptor:
            with suppress(OSError):  # its reader may have left
                stream.close()


def _is_descriptor(stream: TextIO, number: int) -> bool:
    """Whether a stream writes to this descriptor; one that a test captures may have none."""
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False


def listed(what: str, items: Sequence[str]) -> str:
    """A count and the first five of what it counts, one a line."""
    shown = [item.replace("\n", "\\n").replace("\r", "\\r") for item in items[:_LISTED]]
    more = [f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return "\n".join([f"{len(items)} {what}:", *shown, *more])


class Console:
    """What a command shows.

    Args:
        quiet: Drop notes and progress; results, warnings and errors stay.
        json: ``True`` or ``"-"`` gives stdout to :meth:`data` alone, so that tables move to stderr;
            any other string is the file that :meth:`data` writes, and the terminal stays as it is.

    Raises:
        UsageError: ``json`` is empty, or the folder of its file does not exist.
        InputError: The file cannot be written.
    """

    def __init__(self, *, quiet: bool = False, json: bool | str | None = False) -> None:
        self.quiet = quiet
        if json == "":
            raise UsageError("--json= names no file", hint="--json FILE.json, or --json alone for stdout")
        self._json_path = Path(json) if isinstance(json, str) and json != "-" else None
        if self._json_path is not None:
            require_report_place("--json", self._json_path)
        self.json = bool(json)
        self._err = _rich(stderr=True)
        self._out = self._err if self.json and self._json_path is None else _rich(stderr=False)
        self._live: Progress | None = None

    def table(
        self,
        title: str,
        columns: Sequence[str | Column],
        rows: Sequence[Sequence[object]],
        *,
        detail: bool = False,
    ) -> None:
        """Show a table; ``None`` cells become ``-``.

        Args:
            title: Printed above it, left-aligned.
            columns: The first is left-justified unless it says otherwise, the others right-justified.
            rows: One sequence of cells per row, shown with ``str``.
            detail: Not a result of the command, so ``--quiet`` drops it.
        """
        if detail and self.quiet:
            return
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), highlight=False
        )
        for index, column in enumerate(columns):
            if isinstance(column, str):
                column = Column(column, "left" if index == 0 else "right")
            table.add_column(escape(column.title), justify=column.justify, overflow="fold")
        for row in rows:
            table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
        console = self._err if detail else self._out
        heading, *rest = _fill(title).split("\n")
        console.print(Text.assemble("\n", (heading, "bold"), *(f"\n{line}" for line in rest)))
        console.print(table)

    def note(self, text: str) -> None:
        """A line on what is happening, on stderr; dropped by ``--quiet``."""
        if not self.quiet:
            self._err.print(Text(_fill(text)), soft_wrap=True)

    def result(self, text: str) -> None:
        """A sentence that belongs to the command's result, beside its tables."""
        self._out.print(Text(_fill(text)), soft_wrap=True)

    def verdict(self, passed: bool, text: str) -> None:
        """A check and its outcome, as ``PASS`` or ``FAIL`` in front of the text."""
        line = Text.assemble(("PASS", "green") if passed else ("FAIL", "bold red"), "  ")
        body = _fill(text, indent=" " * 6).lstrip()
        self._out.print(line.append(body), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something the user should know although the command goes on; never dropped."""
        self._labelled("warning", "yellow", text)

    def error(self, message: str, *, hint: str | None = None) -> None:
        """What went wrong and, after an empty line, what to do about it."""
        self._labelled("error", "bold red", message)
        if hint:
            self._err.print()
            self._labelled("hint", "cyan", hint)

    def data(self, obj: object) -> None:
        """Write a result as JSON where ``--json`` said; nothing without ``--json``.

        Raises:
            InputError: The file cannot be written.
        """
        if not self.json:
            return
        text = jsonlib.dumps(obj, indent=2, allow_nan=False) + "\n"
        if self._json_path is None:
            stream = _DATA_STREAM.get() or sys.stdout
            stream.write(text)
            stream.flush()
        else:
            write_atomically(self._json_path, text)
            self.note(f"report written to {self._json_path}")

    @contextmanager
    def progress(self, label: str) -> Iterator[ProgressCallback]:
        """Show how far a task is; hand the callback it gives to the library. May be nested.

        Args:
            label: What is being done, a few words.
        """
        if self.quiet:
            yield _silent
        elif _is_terminal():
            with self._bar(label) as callback:
                yield callback
        else:
            yield _PlainProgress(self, label)

    @contextmanager
    def _bar(self, label: str) -> Iterator[ProgressCallback]:
        outermost = self._live is None
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._err,
                transient=True,
            )
            self._live.start()
        live = self._live
        task = live.add_task(label, total=None, text="")

        def callback(done: int, total: int, text: str = "") -> None:
            if live.tasks[live.task_ids.index(task)].total not in (None, total):
                live.reset(task)  # another kind of work: its time left is its own
            live.update(task, completed=done, total=total, text=text)

        try:
            yield callback
        finally:
            live.remove_task(task)
            if outermost:
                live.stop()
                self._live = None

    def _labelled(self, label: str, style: str, text: str) -> None:
        line = Text.assemble((f"{label}:", style), " ")
        body = _fill(text, width=WIDTH - len(label) - 2)
        self._err.print(line.append(body.replace("\n", "\n  ")), soft_wrap=True)


class _PlainProgress:
    """Progress as plain lines: every step when there are few, else about ten, or one in half a minute."""

    def __init__(self, console: Console, label: str) -> None:
        self._console, self._label = console, label
        self._start = self._last = time.monotonic()
        self._shown = self._total = 0

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if total != self._total and self._total:  # another kind of work: its time left is its own
            self._start, self._shown = now, 0
        self._total = total
        step = 1 if total <= _FEW_STEPS else total / _PLAIN_STEPS
        due = done - self._shown >= step or (done >= total and self._shown < total)
        if not due and now - self._last < _PLAIN_SECONDS:
            return
        self._shown, self._last = done, now
        elapsed = now - self._start
        left = elapsed / done * (total - done) if done and elapsed else None
        parts = [f"{self._label} {done}/{total}", format_seconds(elapsed)]
        if left is not None and done < total:
            parts.append(f"{format_seconds(left)} left")
        if text:
            parts.append(text)
        self._console.note(", ".join(parts))


class LogHandler(logging.Handler):
    """Shows the library's warnings as ``warning:`` lines, equal ones once; with ``--debug`` every record."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record on stderr, above a live progress bar if there is one."""
        if self.level >= logging.WARNING and record.getMessage() in self.shown:
            return
        self.shown.add(record.getMessage())
        label = "warning" if record.levelno >= logging.WARNING else record.levelname.lower()
        body = _fill(record.getMessage(), width=WIDTH - len(label) - 2).replace("\n", "\n  ")
        sys.stderr.write(f"{label}: {body}\n")


def format_seconds(seconds: float) -> str:
    """A duration in one or two units: ``8 s``, ``2 min 05 s``, ``1 h 03 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _silent(done: int, total: int, text: str = "") -> None:
    del done, total, text


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _rich(*, stderr: bool) -> RichConsole:
    stream = sys.stderr if stderr else sys.stdout
    # A CI log has no width of its own; on a terminal Rich asks the terminal.
    width = None if stream.isatty() else WIDTH
    return RichConsole(stderr=stderr, width=width, highlight=False, emoji=False)


def _fill(text: str, *, width: int = WIDTH, indent: str = "") -> str:
    """Wrap prose to the width, indent included; a path, or a line that is a command, is never broken."""
    wrapper = textwrap.TextWrapper(
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(line if _COMMAND.match(line) else wrapper.fill(line) for line in text.split("\n"))
