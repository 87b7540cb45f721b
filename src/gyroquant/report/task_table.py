"""The table of `evaluate --tasks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from gyroquant.report.console import table

_NONE = "-"


def task_table(result: Mapping[str, Any]) -> Table:
    """The accuracy in every task in percent: of the model and, with `--against`, of the original, with the difference.

    The last row, `together`, is of the items of all offline tasks.
    """
    rows = dict(result["tasks"])
    if result.get("tasks_together"):
        rows["together"] = result["tasks_together"]
    compared = any("original" in facts for facts in rows.values())
    columns = ["task", "items", "chance", "accuracy", "95 % interval", "by bytes"]
    columns += ["original", "difference", "95 % interval", "p"] if compared else []
    cells = [_score(name, facts) + (_difference(facts) if compared else []) for name, facts in rows.items()]
    return table("accuracy in zero-shot tasks, in %", columns, cells, right=tuple(range(1, len(columns))))


def _score(name: str, facts: Mapping[str, Any]) -> list[str]:
    items, asked = facts.get("items"), facts.get("items_asked")
    fewer = f" of {asked}" if items is not None and asked is not None and items < asked else ""
    return [
        name,
        _NONE if items is None else f"{items}{fewer}",
        _percent(facts.get("chance")),
        _percent(facts["acc"]),
        _pair(facts["interval"]),
        _percent(facts.get("acc_bytes")),
    ]


def _difference(facts: Mapping[str, Any]) -> list[str]:
    """The original's accuracy, the difference from it, its interval and p. Groups of tasks have no paired test."""
    original, paired = facts.get("original") or {}, facts.get("paired")
    cells = [_percent(original.get("acc"))]
    if paired is None:
        return [*cells, _NONE, _NONE, _NONE]
    p = "< 0.001" if paired["p"] < 0.001 else f"{paired['p']:.3f}"
    return [*cells, f"{100 * paired['difference']:+.1f}", _pair(paired["interval"], sign="+"), p]


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f}"


def _pair(ends: Any, sign: str = "") -> str:
    return f"{100 * ends[0]:{sign}.1f} to {100 * ends[1]:{sign}.1f}"


__all__ = ["task_table"]
