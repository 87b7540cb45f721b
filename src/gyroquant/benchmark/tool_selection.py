"""The rows of external tools at equal bytes: of each tool, the largest of its settings within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gyroquant.benchmark.kinds import EXTERNAL_TOOL
from gyroquant.benchmark.sizes import ALIKE, WEIGHTS, bytes_of, enough, text

Row = Mapping[str, Any]


def selected(
    tool: str, rows: Sequence[Row], budget: int, least: Mapping[str, int], problem: str
) -> list[dict[str, Any]]:
    """The rows of an external tool within a budget of bytes.

    tool: its name, with or without a variant.
    rows: its settings that were run, as a comparison stores runs.
    budget: bytes.
    least: a lower bound of the bytes of each setting, by label.
    problem: why it supports no setting. Empty if it supports one.

    These are the results with the most bytes of all that have at most `budget`: those that differ by ALIKE or less have
    equal bytes, and are all in. A tool without such a result is one row with the reason, which names its smallest size.
    """
    sized = [(row, size) for row in rows if (size := _size(row)) is not None]
    fitting = [(row, size) for row, size in sized if size <= budget]
    waiting = [row for row in rows if row["status"] != "done" and least[row["label"]] <= budget]
    if fitting:
        most = max(size for _, size in fitting)
        alike = [row for row, size in fitting if size * (1 + ALIKE) >= most]
        return [_within(row, budget, [str(other["label"]) for other in waiting]) for row in alike]
    return [_without(tool, rows, budget, *_reason(waiting, sized, least, problem))]


def _size(row: Row) -> float | None:
    return bytes_of(row, WEIGHTS) if row["status"] == "done" else None


def _within(row: Row, budget: int, waiting: Sequence[str]) -> dict[str, Any]:
    """A result as the row of a budget, with a key of its own: several budgets may have the same result.

    waiting: the tool's settings that have no result yet and may fit, by label.
    """
    return {**row, "key": f"{row['key']}-{budget}", "max_bytes": budget, "waiting": list(waiting)}


def _reason(
    waiting: Sequence[Row], sized: Sequence[tuple[Row, float]], least: Mapping[str, int], problem: str
) -> tuple[str, str]:
    """The status of a tool without a result within a budget, and the reason."""
    if problem:
        return "refused", problem
    if waiting:  # one of them may fit
        first = waiting[0]
        return str(first["status"]), f"{first['label']}: {first['reason']}"
    if sized:
        row, smallest = min(sized, key=lambda pair: pair[1])
        return "refused", f"none of its settings takes as little: the smallest is {enough(smallest)}, {row['label']}"
    label = min(least, key=least.__getitem__)
    return (
        "refused",
        f"none of its settings takes as little: the smallest, {label}, has at least {enough(least[label])}",
    )


def _without(tool: str, rows: Sequence[Row], budget: int, status: str, reason: str) -> dict[str, Any]:
    first: Row = next(iter(rows), {})
    return {
        "key": f"{tool}-{budget}",
        "kind": EXTERNAL_TOOL,
        "name": tool,
        "label": f"{tool} {text(budget)}",
        "bits": first.get("bits", 0),
        "group_size": first.get("group_size", -1),
        "symmetric": first.get("symmetric", False),
        "seed": first.get("seed", 0),
        "nsamples": first.get("nsamples"),
        "command": "",
        "rotated": False,
        "home": first.get("home"),
        "max_bytes": budget,
        "status": status,
        "reason": reason,
    }


__all__ = ["selected"]
