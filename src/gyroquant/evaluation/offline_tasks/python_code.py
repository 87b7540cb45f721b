"""The next line of a function in Python's standard library, among lines of the same file with the same indentation."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from gyroquant.errors import InputError
from gyroquant.evaluation.offline_tasks.items import CHOICES, Draw, Item

_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo", "pydoc_data"}
_BEFORE = 8  # lines of a question
_LENGTHS = (12, 80)  # characters of a line without its indentation
_RATIO = 1.5  # lengths of two lines differ by at most this factor
_PER_FILE = 3


def make_code(count: int, draw: Draw, folder: Path | None = None) -> list[Item]:
    """At most `count` items from the files of a folder, by default those of Python's standard library.

    A question is up to 8 lines of a file. The right choice is the next line, a whole statement inside a function or a
    class. The wrong ones are other such lines of the file, of like length, with the same indentation, and not in the
    question. Raises InputError if the folder has no Python files.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_files(folder))
    if not files:
        raise InputError(
            f"{folder} has no Python sources, which the task code needs: use a Python that was installed with its "
            "standard library as .py files, or leave the task out"
        )
    items: list[Item] = []
    for path in draw.shuffled(files):
        items += _of_file(path, min(_PER_FILE, count - len(items)), draw)
        if len(items) == count:
            break
    return items


def _files(folder: Path) -> Iterator[Path]:
    """The Python files in a folder and the folders in it, without tests, installed packages and private modules."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        yield from (Path(place, name) for name in names if name.endswith(".py") and not name.startswith("_"))


def _of_file(path: Path, count: int, draw: Draw) -> list[Item]:
    """At most `count` items of one file. None if it is not Python in UTF-8."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers = sorted(set(_statements(ast.parse(source))))
    except (OSError, SyntaxError, ValueError):
        return []
    lines, items = [line.rstrip() for line in source.split("\n")], list[Item]()
    numbers = [number for number in numbers if _LENGTHS[0] <= len(lines[number].strip()) <= _LENGTHS[1]]
    for number in draw.shuffled(numbers):
        if len(items) == count:
            break
        before, right = lines[max(0, number - _BEFORE) : number], lines[number]
        others = {lines[other] for other in numbers if _alike(lines[other], right)} - {right, *before}
        if right not in before and any(before) and len(others) >= CHOICES - 1:
            items.append(draw.item("\n".join(before), right, draw.shuffled(sorted(others))[: CHOICES - 1]))
    return items


def _statements(tree: ast.AST) -> Iterator[int]:
    """The indices of the lines that are one indented statement. Texts such as docstrings are none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node.lineno == node.end_lineno and node.col_offset > 0:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not text and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.lineno - 1


def _alike(line: str, right: str) -> bool:
    """Whether two lines have the same indentation and like lengths."""
    a, b = line.strip(), right.strip()
    return len(line) - len(a) == len(right) - len(b) and max(len(a), len(b)) <= _RATIO * min(len(a), len(b))


__all__ = ["make_code"]
