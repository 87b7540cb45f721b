"""Of an external tool, the largest of its settings within a budget; or why there is none."""

from __future__ import annotations

from typing import Any

from gyroquant.benchmark.tool_selection import selected

LEAST = {"small": 10, "good": 20, "twin": 20, "large": 30}


def row(label: str, size: int | None, status: str = "done", reason: str | None = None) -> dict[str, Any]:
    found = {"key": label, "label": label, "bits": 2, "group_size": 64, "symmetric": False, "seed": 0, "home": "a/b"}
    return found | {"status": status, "reason": reason, "weight_bytes": {"total": size}}


def labels(rows: list[dict[str, Any]]) -> list[str]:
    return [one["label"] for one in rows]


def test_the_largest_that_fit_are_taken_with_all_of_the_same_bytes() -> None:
    rows = [row("small", 40_000), row("good", 59_900), row("twin", 59_700), row("large", 60_001)]
    found = selected("tool", rows, 60_000, LEAST, "")
    assert labels(found) == ["good", "twin"]
    assert [(one["key"], one["max_bytes"]) for one in found] == [("good-60000", 60_000), ("twin-60000", 60_000)]
    assert labels(selected("tool", rows, 60_001, LEAST, "")) == ["good", "twin", "large"]
    assert labels(selected("tool", rows, 50_000, LEAST, "")) == ["small"]


def test_a_setting_without_a_result_that_may_be_larger_is_told() -> None:
    rows = [row("small", 40_000), row("good", None, "failed", "it was killed")]
    assert selected("tool", rows, 60_000, LEAST, "")[0]["waiting"] == ["good"]
    assert selected("tool", rows, 60_000, LEAST | {"good": 70_000}, "")[0]["waiting"] == []


def test_what_is_too_large_is_one_row_that_names_the_smallest_size() -> None:
    (one,) = selected("tool", [row("good", 59_900), row("large", 80_000)], 50_000, LEAST, "")
    assert (one["label"], one["status"], one["max_bytes"]) == ("tool 50.0 kB", "refused", 50_000)
    assert one["reason"] == "none of its settings takes as little: the smallest is 0.060 MB, good"
    (one,) = selected("tool", [], 50_000, {"good": 60_000, "large": 70_000}, "")
    assert one["reason"] == "none of its settings takes as little: the smallest, good, has at least 0.060 MB"


def test_a_tool_that_did_not_run_says_why() -> None:
    (one,) = selected("tool", [row("good", None, "missing", "no time")], 50_000, LEAST, "")
    assert (one["status"], one["reason"]) == ("missing", "good: no time")
    (one,) = selected("tool", [], 50_000, {}, "it needs groups of 32")
    assert (one["status"], one["reason"]) == ("refused", "it needs groups of 32")
