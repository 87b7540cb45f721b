"""A report as Markdown: the verdict, the table of measurements, the table of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gyroquant.evaluation.diagnosis.measures import (
    BLOCK_HEADINGS,
    HEADINGS,
    block_cells,
    facts,
    headline,
    measures,
    task_measures,
)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page of Markdown."""
    parts = [
        f"# {headline(report)}",
        str(report["diagnosis"]["verdict"]["reason"]),
        _plain(facts(report)),
        _table(HEADINGS, [measure.cells() for measure in [*measures(report), *task_measures(report)]]),
        "## Blocks",
        _table(BLOCK_HEADINGS, block_cells(report)),
    ]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """A text whose characters mean nothing to Markdown."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in text)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
