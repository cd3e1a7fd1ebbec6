"""docs/guides/python.md is true: its code runs, as it stands, in the folder that the demo writes."""

import re
import subprocess
import sys

import metaaug_cli
from metaaug_cli.demo import prepare_demo


def test_the_guides_code_runs_and_its_file_agrees(repository, tmp_path):
    guide = (repository / "docs" / "guides" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    prepare_demo(tmp_path / "demo")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "demo", capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+ bytes, 200 images: all \d+ code tensors agree\n", done.stdout), done.stdout
    assert (tmp_path / "demo" / "digits.onnx").stat().st_size == int(done.stdout.split()[0])


def test_the_guide_names_everything_that_is_public(repository):
    guide = (repository / "docs" / "guides" / "python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", guide, re.MULTILINE))))
    assert named == set(metaaug_cli.__all__)
