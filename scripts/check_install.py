"""Fail when the environment lacks anything pyproject.toml asks for, or a library cannot be loaded.

``pip check`` compares what is installed with what is declared; it does not notice an interrupted
download or a shared library that does not load, so every run-time dependency is imported too.
"""

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError, requires

IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
HINT = '''
hint: torch and torchvision must come from the same index; `make clean` and start again, for example
  make install PIP_FLAGS="--index-url URL_OF_CPU_BUILDS --extra-index-url URL_OF_ALL_ELSE"'''
TOOLS = ["hypothesis", "jsonschema", "mypy", "pytest", "ruff"]


def run_time_modules() -> list[str]:
    """Import names of the dependencies declared without an extra."""
    declared = [line for line in requires("metaaug") or [] if "extra ==" not in line]
    names = [re.split(r"[^\w-]", line, maxsplit=1)[0] for line in declared]
    return sorted(IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names)


def broken_modules() -> list[str]:
    """One line for each module that cannot be imported, with the reason."""
    try:
        modules = [*run_time_modules(), "metaaug_cli", *TOOLS]
    except PackageNotFoundError:
        return ["metaaug itself is not installed"]
    broken = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            broken.append(f"{module}: {error}")
    return broken


if __name__ == "__main__":
    problems = broken_modules()
    for problem in problems:
        print(f"error: incomplete installation: {problem}", file=sys.stderr)
    if problems:
        print(HINT, file=sys.stderr)
    sys.exit(1 if problems else 0)
