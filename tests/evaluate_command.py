"""``metaaug evaluate`` on the small run of ``tests/cli/conftest.py``."""

import json

import jsonschema

from metaaug_cli.cli.app import main
from metaaug_cli.verification.report import report_schema

SIZE, CLASSES, IMAGES = 12, 6, 60
FLAGS = ["--size", str(SIZE), "--mean", ".5,.5,.5", "--std", ".25,.25,.25"]


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def report_of(capsys, *arguments):
    code = evaluate(*arguments, "--json", "--quiet")
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, report_schema())
    return code, report
