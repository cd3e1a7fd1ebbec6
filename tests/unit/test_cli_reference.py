"""The command page says what the commands say."""

import runpy

import typer

from metaaug_cli.cli.app import app


def page_of(repository):
    return (repository / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")


def test_command_page_is_not_stale(repository):
    generator = runpy.run_path(str(repository / "scripts" / "generate_cli_reference.py"))
    assert page_of(repository) == generator["reference"](), "run: make docs"


def test_every_command_and_flag_is_on_the_page_with_a_meaning(repository):
    page = page_of(repository)
    groups = [("metaaug", typer.main.get_command(app))]
    for path, group in groups:
        for name, command in group.commands.items():
            assert f"## {path} {name}\n" in page
            _, _, section = page.partition(f"## {path} {name}\n")
            section = section.partition("\n## ")[0]
            for parameter in command.params:
                flag = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
                rows = [line for line in section.splitlines() if line.startswith(f"| `{flag}")]
                assert rows or parameter.name == "help", f"{path} {name} {flag}"
                assert all(line.split(" | ")[1].strip() for line in rows)
            if hasattr(command, "commands"):
                groups.append((f"{path} {name}", command))
