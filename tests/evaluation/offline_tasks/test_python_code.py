"""The right line is the next one of the file; the others are of the same file, with the same indentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gyroquant as gq
from gyroquant.evaluation.offline_tasks import Draw
from gyroquant.evaluation.offline_tasks.python_code import make_code

FOLDER = Path(gq.__file__).parent / "maps"  # Python files that are here, and fewer than the standard library


@given(st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_the_answer_is_the_next_line(seed: int) -> None:
    sources = [path.read_text() for path in FOLDER.rglob("*.py")]
    for item in make_code(9, Draw(seed, "code"), FOLDER):
        right = item.choices[item.answer]
        (source,) = [source for source in sources if f"{item.question}\n{right}\n" in source][:1]
        lines, indentation = source.split("\n"), len(right) - len(right.lstrip())
        assert indentation > 0
        assert len(item.question.split("\n")) <= 8
        for choice in item.choices:
            assert choice in lines
            assert choice not in item.question.split("\n")
            assert len(choice) - len(choice.lstrip()) == indentation
        lengths = [len(choice.strip()) for choice in item.choices]
        assert max(lengths) <= 1.5**2 * min(lengths)


def test_strings_and_headings_are_no_lines(tmp_path: Path) -> None:
    body = "\n".join(f"    value_{number} = number + {number}" for number in range(12))
    (tmp_path / "a.py").write_text(f'def function(number):\n    "A docstring of one line."\n{body}\n    "text here"\n')
    items = make_code(200, Draw(0, "code"), tmp_path)
    assert len(items) == 3  # of each file
    assert all(choice.startswith("    value_") for item in items for choice in item.choices)


def test_files_that_are_not_python_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("not ( python")
    (tmp_path / "b.py").write_bytes(b"\xff\xfe")
    assert make_code(5, Draw(0, "code"), tmp_path) == []


def test_a_python_without_sources_is_told(tmp_path: Path) -> None:
    with pytest.raises(gq.InputError, match="no Python sources"):
        make_code(5, Draw(0, "code"), tmp_path)


def test_the_standard_library_has_items() -> None:
    items = make_code(4, Draw(0, "code"))
    assert len(items) == 4
    assert items == make_code(4, Draw(0, "code"))
