"""The rules of the house: arrows between rooms go down only, files and functions stay small, the README is true."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gyroquant

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "gyroquant"
# From top to bottom; a room imports only from those below it.
ROOMS = [
    "__main__",
    "cli",
    "__init__",
    "testing",
    "benchmark",
    "report",
    "inspection",
    "api",
    "pipeline",
    "recipes",
    "finetuning",
    "evaluation",
    "rounding",
    "methods",
    "calibration",
    "formats",
    "models",
    "grids",
    "maps",
    "system",
    "registry",
    "errors",
]
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_room_is_on_the_list() -> None:
    assert {room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_go_down_only(path: Path) -> None:
    here = ROOMS.index(room(path))
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gyroquant"):
            inner = node.module.split(".")[1:2]
            names = inner or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gyroquant.")]
        for name in names:
            assert ROOMS.index(name) >= here, f"{path.name} imports {name}, which is above {room(path)}"


def module(path: Path) -> str:
    parts = ("gyroquant", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules that code imports at any level, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & modules) | {node.module for name in inner if name not in modules}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module(path): path for path in FILES}
    graph = {name: imports(ast.parse(path.read_text()), set(modules)) - {name} for name, path in modules.items()}
    assert circle(graph) == []


def test_a_circle_is_seen_also_through_a_function() -> None:
    source = {"a": "import b", "b": "def f():\n    from c import d", "c": "from a import x"}
    graph = {name: imports(ast.parse(text), set(source)) for name, text in source.items()}
    assert set(circle(graph)) == {"a", "b", "c"}
    assert circle(graph | {"c": set()}) == []


def test_nothing_imports_the_benchmark_but_the_command_line_and_the_public_face() -> None:
    importing = {room(path) for path in FILES if "from gyroquant.benchmark" in path.read_text()}
    assert importing - {"benchmark"} <= {"cli", "__init__"}


def test_commands_import_at_the_top() -> None:
    """A command's module is imported when it runs: it has no need for imports inside functions."""
    for path in (SOURCE / "cli").glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            imports = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not imports, f"{path.name}: {function.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 75, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_everything_public_exists() -> None:
    for name in gyroquant.__all__:
        assert hasattr(gyroquant, name)
    assert gyroquant.maps.hadamard(4).dense().shape == (4, 4)


def test_asserts_and_prints_are_not_for_users() -> None:
    for path in FILES:
        if room(path) in ("cli", "report") or "runners" in path.parts:  # programs of their own
            continue
        assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path.name
