"""The promises of the layout: small files, imports that point down, a core that never prints."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import metaaug_cli

PACKAGE = Path(metaaug_cli.__file__).resolve().parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
CORE = [path for path in SOURCES if "cli" not in path.relative_to(PACKAGE).parts]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function; not those for type checkers only."""
    found = set()
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _runtime_nodes(child)


def by_name(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in paths]


@pytest.mark.parametrize("path", by_name(SOURCES))
def test_no_file_outgrows_a_few_screens(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", by_name(SOURCES))
def test_no_function_outgrows_a_screen(path):
    lengths = {
        node.name: node.end_lineno - _start(node, path) + 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def _start(function: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> int:
    """First line that counts: a command's signature is its table of flags, not code."""
    return function.lineno if path in CORE else function.body[0].lineno


@pytest.mark.parametrize("path", by_name(CORE))
def test_core_knows_neither_terminal_nor_commands(path):
    imports = imported_modules(path)
    terminal = {name for name in imports if name.split(".")[0] in {"typer", "rich", "click"}}
    assert terminal == set()
    if path.name != "__main__.py":
        assert {name for name in imports if name.startswith("metaaug_cli.cli")} == set()


@pytest.mark.parametrize("path", by_name(CORE))
def test_core_never_prints(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert names & {"print", "sys.stdout.write", "sys.stderr.write"} == set()


def test_imports_have_no_cycle():
    modules = {module_name(path): path for path in SOURCES}
    graph = {name: imported_modules(path) & (modules.keys() - {name}) for name, path in modules.items()}
    for name in graph:
        graph[name].discard("metaaug_cli")  # the lazy package file is everyone's parent
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == modules.keys()


def test_packages_build_on_each_other_in_one_direction():
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        needed = {part_of(name) for name in imported_modules(path) if name.startswith("metaaug_cli.")}
        graph.setdefault(part_of(module_name(path)), set()).update(needed)
    parts = {name: needed - {name} for name, needed in graph.items()}
    assert set(TopologicalSorter(parts).static_order()) >= {"graph", "quantization", "pipeline", "cli"}


def part_of(module: str) -> str:
    """The package of a module, or the module itself where it stands beside the packages."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("name", ["functional", "losses"])
def test_mathematics_depends_on_torch_alone(name):
    path = PACKAGE / "quantization" / f"{name}.py"
    own = {module for module in imported_modules(path) if module.startswith("metaaug_cli")}
    assert own == set()


def modules_loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("LOADED")]
    return set(line.split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import metaaug_cli; metaaug_cli.Recipe, metaaug_cli.load_recipe('w4a4'), metaaug_cli.MetaAugError",
        "from metaaug_cli.cli.app import main; assert main(['--help']) == 0",
        "from metaaug_cli.cli.app import main; assert main(['quantize', '--help']) == 0",
        "from metaaug_cli.cli.app import main; assert main(['evaluate', '--help']) == 0",
        "from metaaug_cli.cli.app import main; assert main(['export', '--help']) == 0",
        "from metaaug_cli.cli.app import main; assert main(['demo', '--help']) == 0",
    ],
)
def test_help_and_recipes_start_without_the_heavy_libraries(code):
    assert modules_loaded_by(code) & {"torch", "torchvision", "onnx", "onnxruntime", "sklearn"} == set()


@pytest.mark.parametrize("name", metaaug_cli.__all__)
def test_every_public_name_resolves_to_its_definition(name):
    value = getattr(metaaug_cli, name)
    assert value.__module__.startswith("metaaug_cli.")
    assert value.__name__ == name
    assert name in dir(metaaug_cli)


def test_no_public_name_equals_a_module():
    assert {path.stem for path in PACKAGE.iterdir()}.isdisjoint(metaaug_cli.__all__)


def test_unknown_public_names_fail_like_any_attribute():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = metaaug_cli.quantise
