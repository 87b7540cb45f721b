"""The page of a report: one HTML file with its plots as SVG. It loads nothing and has no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from gyroquant.evaluation.diagnosis.charts import Series, line_chart
from gyroquant.evaluation.diagnosis.measures import (
    BLOCK_HEADINGS,
    HEADINGS,
    block_cells,
    facts,
    headline,
    measures,
    task_measures,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def plots(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plots of a report: SVG elements with their captions."""
    found = report["diagnosis"]
    rows = found["blocks"]
    x, at = [row["block"] for row in rows], found["verdict"]["block"]

    def of(key: str) -> list[float | None]:
        return [row[key] for row in rows]

    errors = [Series("after the block", of("relative_error")), Series("of the block alone", of("own_error"))]
    cosines = [Series("after the block", of("cosine")), Series("of the block alone", of("own_cosine"))]
    linear = [Series(name, [row["linear_r2"][name] for row in rows]) for name in ("original", "rounded")]
    steps = [name for name in ("continuations", "generations") if name in found]
    longest = max(max(found[name]["lengths"]) for name in steps)
    shares = [Series(name, _different(found[name], longest)) for name in steps]
    return [
        (line_chart("Relative error by block", "block", x, errors, (0, None), at), "Relative error of the state."),
        (line_chart("Cosine by block", "block", x, cosines, (None, 1), at), "Cosine with the original's state."),
        (
            line_chart("Linear replaceability by block", "block", x, linear, (None, 1)),
            "R² of one linear map in place of the block, on held-out tokens.",
        ),
        (
            line_chart("Texts that differ by step", "step", list(range(longest + 1)), shares, (0, 1)),
            "Share of texts in which a choice up to this step is not the original's.",
        ),
    ]


def _different(found: Mapping[str, Any], longest: int) -> list[float | None]:
    """The share of texts whose first difference is at a step or before, for every step from 0 on."""
    return [
        sum(first is not None and first <= step for first in found["first"]) / found["texts"]
        if step <= max(found["lengths"])
        else None
        for step in range(longest + 1)
    ]


def page(report: Mapping[str, Any]) -> str:
    """The report as an HTML page."""
    css = (resources.files(__package__) / "page.css").read_text(encoding="utf-8")
    figures = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in plots(report)
    )
    model = escape(str(report["model"]))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{model}: diagnosis of a rounded model</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="kind">Diagnosis of a rounded model</p>
<h1>{escape(headline(report))}</h1>
<p class="lead">{escape(report["diagnosis"]["verdict"]["reason"])}</p>
<p class="facts">{escape(facts(report))}</p>
</header>
<main>
<h2>Measurements</h2>
{_table(HEADINGS, [measure.cells() for measure in [*measures(report), *task_measures(report)]])}
<h2>Plots</h2>
<div class="panels">{figures}</div>
<h2>Blocks</h2>
{_table(BLOCK_HEADINGS, block_cells(report))}
</main>
</body>
</html>
"""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(cells[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])}</tr>'
        for cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(headings[0])}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )
