"""What `gyroquant compare` prints."""

from __future__ import annotations

import copy

from comparison_example import example
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
    first = compared({**comparison, "verdict": [{**judged, "over": [over]}]}, "OUT")
    names = [str(cell) for part in first if isinstance(part, Table) for cell in part.columns[0].cells]
    assert [name.endswith("(over the budget)") for name in names[: len(judged["rows"])]].count(True) == 1
    assert names[len(judged["rows"]) - 1].endswith("(over the budget)")
