"""A comparison as Markdown: the verdict, one table per budget, and the diagnostics. It has the numbers of the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gyroquant.benchmark.diagnostics import Table, layers_table, mass_table, outliers_table, seeds_table
from gyroquant.benchmark.rows import (
    Column,
    Row,
    budgets,
    columns,
    rows,
    sizes,
    tests,
)
from gyroquant.benchmark.sentences import counts, introduction, model_facts, notes, original_line
from gyroquant.benchmark.sizes import budget_of, budget_text


def markdown(comparison: Mapping[str, Any]) -> str:
    """The report on a comparison as Markdown. `comparison` is the content of its ``comparison.json``."""
    missing = counts(comparison)
    lines = [
        f"# {_plain(comparison['name'])}",
        f"{_plain(model_facts(comparison))}. Made {comparison['made']}.",
        _plain(introduction(comparison)) + (f" Without a result: {missing}." if missing else ""),
        *(f"> {_plain(note)}" for note in comparison["notes"]),
        "## Verdict",
        *_verdict(comparison),
        *_results(comparison),
    ]
    for title, table in (
        ("Errors of the layers", layers_table(comparison)),
        ("Outliers, means over blocks", outliers_table(comparison)),
        ("l1 mass of blocks", mass_table(comparison)),
        ("Perplexity over seeds", seeds_table(comparison)),
    ):
        if any(any(cell.strip("-/ ") for cell in row[1:]) for row in table.rows):
            lines += [f"## {title}", _table(table)]
    return "\n\n".join([*lines, "## How to repeat this comparison", *_repeat(comparison)]) + "\n"


def _verdict(comparison: Mapping[str, Any]) -> Iterable[str]:
    for of_bits in budgets(comparison):
        yield f"### {budget_text(budget_of(of_bits[0]))}"
        commands: list[str] = []
        for budget in of_bits:
            prefix = f"On {budget['test']}: " if len(of_bits) > 1 else ""
            yield from map(_plain, (prefix + budget["text"]).splitlines())
            if budget["command"] and budget["command"] not in commands:
                commands.append(budget["command"])
                yield _code(budget["command"])
                if budget.get("home"):
                    yield _plain(f"The tool's repository: {budget['home']}")
    if not comparison["verdict"]:
        yield "There is no verdict: no method has a result yet."


def _results(comparison: Mapping[str, Any]) -> Iterable[str]:
    shown = [column for column in columns(comparison) if column.key != "bits"]
    for test in tests(comparison):
        for bits in sizes(comparison):
            of_bits = [row for row in rows(comparison, test) if budget_of(row.run) == bits]
            if not of_bits:
                continue
            original = original_line(comparison, test)
            yield f"## {budget_text(bits)}, {_plain(test)}"
            if original:
                yield f"The original: perplexity {original}."
            headings = ("method", *(column.heading for column in shown))
            yield _table(Table(headings, [(_method(row), *_cells(row, shown)) for row in of_bits]))
    if shown:
        yield _plain(notes(comparison))


def _method(row: Row) -> str:
    words = [row.name, *([f"({row.seed})"] if row.seed else []), *(f"*{mark}*" for mark in (*row.roles, *row.marks))]
    if not row.done:
        reason = row.run["reason"]
        words.append(f"{row.run['status']}{f': {reason}' if reason else ''}")
    return " ".join(words)


def _cells(row: Row, shown: Sequence[Column]) -> Iterable[str]:
    for column in shown:
        beside = column.beside(row)
        yield column.text(row) + (f" ({beside})" if beside else "")


def _repeat(comparison: Mapping[str, Any]) -> Iterable[str]:
    if comparison["command"]:
        yield _code(comparison["command"])
    for name in ("settings", "versions"):
        pairs = ", ".join(f"{key} {value}" for key, value in comparison[name].items())
        if pairs:
            yield _plain(f"{name.capitalize()}: {pairs}.")


def _table(table: Table) -> str:
    lines = [table.headings, ("---", *["---:"] * (len(table.headings) - 1)), *table.rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Text on one line, escaped: it is neither HTML nor a table nor a link."""
    return re.sub(r"([\\`<>|\[\]])", r"\\\1", " ".join(str(text).split()))


def _code(command: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", command)), default=0))
    return f"{fence}sh\n{command}\n{fence}"
