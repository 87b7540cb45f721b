"""The rules of the house: arrows between rooms go down only, files and functions stay small, the README is true."""

import ast
import re
from pathlib import Path

import pytest

import gyroquant

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "gyroquant"
# From top to bottom; a room imports from those behind it.
ROOMS = [
    "__main__",
    "cli",
    "__init__",
    "comparison",
    "report",
    "fuzz",
    "inspection",
    "predict",
    "verification",
    "deploy",
    "export_check",
    "chat",
    "footprint",
    "runtimes",
    "opponents",
    "api",
    "pipeline",
    "estimate",
    "elsewhere",
    "apart",
    "allocation",
    "blocks",
    "blockwise",
    "job",
    "refusals",
    "evaluation",
    "export",
    "planning",
    "recipe",
    "presets",
    "learning",
    "rounding",
    "methods",
    "calibration",
    "models",
    "grids",
    "maps",
    "journal",
    "pool",
    "processes",
    "integrity",
    "files",
    "environment",
    "progress",
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, node.name


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
        if room(path) in ("cli", "report") or "sides" in path.parts:  # programs of their own
            continue
        assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path.name
