"""The second table of docs/architectures.md: its derived half is made again and compared."""

from __future__ import annotations

import re
from pathlib import Path

import every_architecture
import pytest
import transformers
from every_architecture import COLUMNS, SITES, Row
from selection import some

from gyroquant.models.deriving.tiny import causal_model_types

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text().partition("## Every class")[2]
CHUNKS = 8


def page_rows() -> dict[str, Row]:
    """The rows of the page, by class."""
    lines = [line.strip("\n")[1:-1].split("|") for line in PAGE.splitlines() if line.startswith("|")]
    lines = lines[lines.index(list(COLUMNS)) + 2 :]
    return {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in lines}


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    made_with = re.search(r"transformers ([\d.]+)", PAGE)
    assert made_with is not None
    if made_with[1] != transformers.__version__:
        pytest.skip(f"the page was made with transformers {made_with[1]}")
    return page_rows()


@pytest.mark.parametrize("chunk", some(range(CHUNKS), (0, 3, 6)))
def test_every_class_is_derived_again(rows: dict[str, Row], chunk: int) -> None:
    """Levels and proven sites must be the same. Errors depend on the machine, but stay small."""
    made, _ = every_architecture.derived_rows(causal_model_types()[chunk::CHUNKS])
    compared = ("class", "kind", "R1", *SITES)
    for row in made:
        shown = rows[row["class"]]
        if "needs a package" in row["why R1 is not fused"] + shown["why R1 is not fused"]:
            continue
        assert [row[name] for name in compared] == [shown[name] for name in compared], shown
        assert not row["error"] or float(row["error"]) <= every_architecture.EXACT


def test_the_page_has_every_class_once(rows: dict[str, Row]) -> None:
    assert list(rows) == causal_model_types()
    assert sum(line.startswith(tuple(f"|{name}|" for name in rows)) for line in PAGE.splitlines()) == len(rows)


def test_the_counts_are_those_of_the_table(rows: dict[str, Row]) -> None:
    assert "\n".join(every_architecture.counts(list(rows.values()))) in PAGE


@pytest.mark.slow
def test_the_rounded_half_of_some_classes(tmp_path: Path) -> None:
    results = every_architecture.quantized_rows(tmp_path, ["bert", "gpt_oss", "hrm_text", "llama"])
    cells = {family: result.cells for family, result in results.items()}
    equal = {"reloaded": "equal", "cache": "equal"}
    assert cells["llama"] == cells["gpt_oss"] == {"rounded with": "R1 R2 R3 R4"} | equal
    assert cells["bert"] == {"rounded with": "R1 online R2 R3 R4", "reloaded": "equal", "cache": "not causal"}
    assert cells["hrm_text"].keys() == {"rounded with"}
    assert cells["hrm_text"]["rounded with"].startswith("not rounded: ")
    assert all("import gyroquant" in result.alone for result in results.values() if not result.problem)


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("llama: model.layers.0.norm has a gain and writes to the residual stream, and a rotation", "post-norm"),
        ("bloom: word_norm has a gain and writes to the residual stream, and a", "norm after the embedding"),
        ("a random map changed the logits by 1.4e+00", "a rotation is not exact"),
        ("x: no tiny model can be built and run (KeyError: 'a | b')", "KeyError: 'a / b'"),
        (
            "x: no tiny model can be built and run (RuntimeError: shapes (2x4 and 3x4))",
            "RuntimeError: shapes (2x4 and 3x4)",
        ),
        ("UnsupportedModelError: zamba: the blocks 2 and 3 share parameters, which", "blocks share parameters"),
    ],
)
def test_reasons_are_short(message: str, short: str) -> None:
    assert every_architecture.short_reason(message) == short
