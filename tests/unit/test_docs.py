"""Pages name files that exist, and link to pages that exist."""

import re

import pytest

PAGES = ["index.md", "guides/quickstart.md", "guides/own-model.md", "guides/few-images.md"]
PAGES += ["guides/calibration-sets.md", "guides/data-free.md", "guides/python.md"]
PAGES += ["concepts/method.md", "concepts/architecture.md", "reference/run-directory.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(repository, page):
    path = repository / "docs" / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["concepts/architecture.md", "concepts/method.md"])
def test_named_files_exist(repository, page):
    text = (repository / "docs" / page).read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w/]+\.py)`", text))
    places = [repository / "metaaug_cli", repository]
    assert {name for name in names if not any((place / name).exists() for place in places)} == set()


def test_every_file_of_the_package_has_its_place(repository):
    text = (repository / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    package = repository / "metaaug_cli"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    helpers = {name for name in files if name.endswith("__init__.py")} | {
        "__main__.py",
        "assets/digits_cnn.py",
    }
    missing = {name for name in files - helpers if f"`{name}`" not in text}
    assert missing == set()
