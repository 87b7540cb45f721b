"""What `gyroquant compare` prints."""

from __future__ import annotations

import copy

from comparison_example import example, of_last_release
from rich.table import Table

from gyroquant.benchmark.console import compared


def test_runs_without_a_result_are_told_once_for_each_reason() -> None:
    comparison = copy.deepcopy(example())
    done = [cell for cell in comparison["cells"] if cell["status"] == "done"]
    for cell in done[:3]:
        cell |= {"status": "missing", "reason": "there was no time"}
    shown = compared({**comparison, "verdict": []}, "OUT")
    (table,) = [part for part in shown if isinstance(part, Table)]
    labels, states, why = ([str(cell) for cell in column.cells] for column in table.columns)
    at = why.index("there was no time")
    assert labels[at] == ", ".join(cell["label"] for cell in done[:3])
    assert states[at] == "missing"
    assert len(set(zip(states, why, strict=True))) == len(why)


def test_results_over_the_budget_are_marked() -> None:
    comparison = example()
    judged = comparison["verdict"][0]
    over = judged["rows"][-1]["key"]
    rows = [{**row, "dominated_by": None} for row in judged["rows"]]
    rows[0]["dominated_by"] = over
    first = compared({**comparison, "verdict": [{**judged, "over": [over], "rows": rows}]}, "OUT")
    names = [str(cell) for part in first if isinstance(part, Table) for cell in part.columns[0].cells]
    assert [name.endswith("(over the budget)") for name in names[: len(rows)]].count(True) == 1
    assert names[len(rows) - 1].endswith("(over the budget)")
    label = next(cell["label"] for cell in comparison["cells"] if cell["key"] == over)
    assert names[0].endswith(f"(dominated by {label})")


def test_sizes_are_told_in_bytes_and_bits() -> None:
    comparison = example()
    tables = [part for part in compared(comparison, "OUT") if isinstance(part, Table)]
    cell = next(run for run in comparison["cells"] if run["key"] == comparison["verdict"][0]["rows"][0]["key"])
    told = [str(column._cells[0]) for column in tables[0].columns]
    assert told[1] == f"{cell['weight_bytes']['total'] / 1e6:.1f} MB"
    assert told[2] == f"{cell['whole_model_bits']:.3f}"
    assert told[3] == f"{cell['true_bits']:.3f}"
    old = [part for part in compared(of_last_release(), "OUT") if isinstance(part, Table)]
    told = [str(column._cells[0]) for column in old[0].columns]
    assert told[1].endswith(" MB")
    assert told[2] == ""
