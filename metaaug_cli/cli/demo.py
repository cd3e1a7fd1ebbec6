"""``metaaug demo``: the whole path on bundled data, through the commands a user would type."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from metaaug_cli.cli.console import Console

_WIDTH = 78

EPILOG = """\
[bold]Examples[/bold]
  metaaug demo
  metaaug demo /tmp/digits

[bold]Afterwards[/bold], with what the demo left in its folder
  metaaug evaluate metaaug-demo/run-w4a4 --data metaaug-demo/test

[bold]Exit codes[/bold]: that of the first command that fails, otherwise 0"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", epilog=EPILOG)(demo)


def demo(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where to write; a new folder, or one from an earlier demo."),
    ] = Path("metaaug-demo"),
) -> None:
    """Quantize, export and evaluate a small bundled network, offline.

    Writes the network, its weights and the images (scikit-learn's handwritten
    digits) into DIR, then runs the commands you would use on your own model
    and shows each before it runs.
    """
    # Imported here so that --help stays fast.
    from metaaug_cli.demo import demo_commands, prepare_demo

    console = Console()
    prepare_demo(folder)
    console.note(f"{folder}: a network for 8x8 digits, its weights, calibration and test images")
    # On 8x8 images a second thread only waits for the first; on a busy machine that costs ten times the time.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for arguments in demo_commands(folder):
        typer.echo(f"\n$ {format_command(['metaaug', *arguments])}")
        finished = subprocess.run(
            [sys.executable, "-m", "metaaug_cli", *arguments], env=environment, check=False
        )
        if finished.returncode != 0:
            console.warn(f"`metaaug {arguments[0]}` ended with exit code {finished.returncode}")
            # A process killed by a signal has a negative code, which a shell cannot pass on.
            raise typer.Exit(finished.returncode if finished.returncode > 0 else 3)


def format_command(arguments: Sequence[str]) -> str:
    """A command to paste into a shell: broken before flags, where it is too long for a line."""
    groups: list[str] = []
    for argument in map(shlex.quote, arguments):
        if groups and (not argument.startswith("-")):
            groups[-1] += f" {argument}"
        else:
            groups.append(argument)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + 3 > _WIDTH:
            lines.append(f"    {group}")
        else:
            lines[-1] += f" {group}"
    return " \\\n".join(lines)
