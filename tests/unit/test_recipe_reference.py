"""The recipe page says what the code does."""

import runpy

import yaml

from metaaug_cli.recipe.config import Recipe


def test_recipe_page_is_not_stale(repository):
    generator = runpy.run_path(str(repository / "scripts" / "generate_recipe_reference.py"))
    page = (repository / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    assert page == generator["reference"](), "run: make docs"


def test_every_key_has_a_row_with_a_meaning(repository):
    page = (repository / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    rows = {
        row.split("|")[1].strip(): row.split("|")[2:-1] for row in page.splitlines() if row.startswith("| `")
    }
    settings = yaml.safe_load(Recipe().dump())
    plain = [name for name, value in settings.items() if not isinstance(value, dict)]
    inner = [key for value in settings.values() if isinstance(value, dict) for key in value]
    for key in plain + inner:
        value, default, meaning = (cell.strip() for cell in rows[f"`{key}`"])
        assert value
        assert default.startswith("`")
        assert meaning.endswith(".")
