"""Write docs/reference/report.schema.json from the dataclasses of metaaug_cli.verification.report."""

from pathlib import Path

from metaaug_cli.files import write_atomically
from metaaug_cli.verification.report import schema_text

if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs" / "reference" / "report.schema.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, schema_text())
