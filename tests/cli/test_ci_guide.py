"""docs/guides/ci.md is true: its workflow runs, step by step, on the demo's files, and its gates can fail."""

import json
import os
import re
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET

import jsonschema
import onnx
import pytest
import yaml

from metaaug_cli.demo import prepare_demo


@pytest.fixture(scope="module")
def guide(request):
    return (request.config.rootpath / "docs" / "guides" / "ci.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def steps(guide):
    (block,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    (job,) = yaml.safe_load(block)["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository as the guide assumes it, and a ``metaaug`` command as ``pip install`` would leave it."""
    folder = tmp_path_factory.mktemp("ci") / "checkout"
    prepare_demo(folder)
    commands = folder.parent / "bin"
    commands.mkdir()
    for name, call in (("metaaug", "-m metaaug_cli"), ("python", "")):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return folder


def run_step(script, folder):
    """As a GitHub runner does: ``bash -e`` in the checkout, a file for the summary, no terminal."""
    environment = {
        **os.environ,
        "PATH": f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(folder.parent / "summary.md"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(steps, checkout):
    assert list(steps) == ["Install", "Quantize", "Export", "Evaluate", "Summary"]
    assert steps["Install"] == "pip install git+https://HOST/OWNER/metaaug.git"
    results = {name: run_step(script, checkout) for name, script in steps.items() if name != "Install"}
    for name, result in results.items():
        assert result.returncode == 0, f"{name}: {result.stdout}{result.stderr}"
    return results


def test_the_workflow_runs_and_its_gates_are_met(finished, checkout):
    report = json.loads((checkout / "report.json").read_text())
    assert report["passed"]
    assert report["onnx"]["path"] == "digits.onnx"
    summary = (checkout.parent / "summary.md").read_text()
    assert summary.count("| met |") == len(report["gates"]) == 5
    assert ET.parse(checkout / "gates.xml").getroot().get("failures") == "0"


def test_the_log_reads_well_in_ci(finished):
    text = finished["Evaluate"].stdout + finished["Evaluate"].stderr
    assert "\x1b[" not in text
    assert "\r" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "nodes run as integers" in text


def test_a_missed_gate_fails_the_step_and_keeps_the_reports(steps, finished, checkout):
    strict = steps["Evaluate"].replace("--onnx digits.onnx", "--onnx wrong.onnx")
    assert strict != steps["Evaluate"]
    model = onnx.load(checkout / "digits.onnx")
    for item in model.graph.initializer:
        if item.name.endswith("head.scale"):
            item.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(item), item.name))
    onnx.save(model, checkout / "wrong.onnx")
    result = run_step(strict, checkout)
    assert result.returncode == 1, result.stderr
    assert "gates missed" in result.stderr
    report = json.loads((checkout / "report.json").read_text())
    assert not report["passed"]
    assert run_step(steps["Summary"], checkout).returncode == 0
    assert "**missed**" in (checkout.parent / "summary.md").read_text()


def test_an_evaluation_that_cannot_run_leaves_no_older_report(steps, checkout, tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (tmp_path / "bin").symlink_to(checkout.parent / "bin")
    (folder / "report.json").write_text("{}")
    assert run_step(steps["Evaluate"], folder).returncode == 2
    assert not (folder / "report.json").exists()
    assert run_step(steps["Summary"], folder).returncode == 0
    assert (tmp_path / "summary.md").read_text() == "no report\n"


def test_the_report_is_valid_under_the_schema_the_guide_links(guide, finished, checkout, request):
    (link,) = re.findall(r"\]\((\S+report\.schema\.json)\)", guide)
    schema = json.loads((request.config.rootpath / "docs" / "guides" / link).read_text())
    jsonschema.validate(json.loads((checkout / "report.json").read_text()), schema)


def test_every_field_the_guide_names_exists(guide, finished, checkout):
    report = json.loads((checkout / "report.json").read_text())
    table = guide.split("| field | |")[1].split("\n\n")[0]
    paths = [cell.split("`")[1] for cell in table.splitlines()[2:]]
    assert len(paths) >= 8
    for path in paths:
        value = report
        for key in path.split("."):
            value = value[key.removesuffix("[]")]
            if key.endswith("[]"):
                value = value[0]


def test_the_exit_codes_are_those_of_the_errors(guide):
    from metaaug_cli import errors

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", guide, re.MULTILINE)}
    raised = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and hasattr(c, "exit_code")}
    assert raised <= documented
