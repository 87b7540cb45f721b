"""Verdicts follow from the windows: paired tests, Pareto front, and words that may say not to rotate."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gyroquant.comparison.verdict import verdict

BASE = [2.0, 2.4, 1.8, 2.2, 2.1, 2.3, 1.9, 2.5]


def cell(name: str, gap: float, bits: float = 2.25, **changes: Any) -> dict[str, Any]:
    """A cell that is this many nats above the original in every window, give or take a little."""
    losses = [loss + gap + 0.001 * (i % 3) for i, loss in enumerate(BASE)]
    mean = sum(losses) / len(losses)
    score = {"loss": mean, "perplexity": math.exp(mean), "perplexity_interval": [1.0, 2.0], "window_losses": losses}
    plain = {"kind": "recipe", "bits": 2, "group_size": 64, "symmetric": False, "seed": 0, "status": "done"}
    rest = {"key": name, "name": name, "true_bits": bits, "command": f"run {name}", "tests": {"text": score}}
    return plain | rest | {"rotated": name != "gptq"} | changes


ORIGINAL = {"text": {"loss": sum(BASE) / len(BASE), "window_losses": BASE}}


def judge(*cells: dict[str, Any]) -> dict[str, Any]:
    (judged,) = verdict(cells, ORIGINAL)
    return judged


def test_rotating_is_recommended_only_where_it_is_significantly_better() -> None:
    judged = judge(cell("gptq", 0.5), cell("gsr", 0.2))
    assert judged["best"] == judged["recommended"] == "gsr"
    assert judged["command"] == "run gsr"
    assert "times lower" in judged["text"]
    assert judge(cell("gptq", 0.5), cell("gsr", 0.6))["text"].endswith("rounding the model as it is.")
    noisy = cell("gsr", 0.5)
    noisy["tests"]["text"]["window_losses"] = [x + (0.7 if i % 2 else 0.29) for i, x in enumerate(BASE)]
    noisy["tests"]["text"]["loss"] = sum(noisy["tests"]["text"]["window_losses"]) / len(BASE)
    judged = judge(cell("gptq", 0.5), noisy)
    assert judged["best"] == "gsr"
    assert judged["recommended"] == "gptq"
    assert "do not rotate" in judged["text"]


def test_another_program_may_win_and_ours_is_named_beside_it() -> None:
    judged = judge(cell("gptq", 0.5), cell("gsr", 0.4), cell("auto-round", 0.1, kind="opponent", rotated=False))
    assert judged["recommended"] == "auto-round"
    assert "Best of our recipes: gsr" in judged["text"]
    assert judged["baseline"] == "gptq"  # never another program's


def test_seeds_are_one_row_with_their_spread_and_what_is_not_done_is_none() -> None:
    other = cell("gsr", 0.3, key="gsr1", seed=1)
    judged = judge(cell("gptq", 0.5), other, cell("gsr", 0.2), {**cell("x", 0.0), "status": "failed"})
    assert [row["key"] for row in judged["rows"]] == ["gsr", "gptq"]
    low, high = judged["rows"][0]["spread"]
    assert high / low == pytest.approx(math.exp(0.1))
    assert judged["rows"][1]["spread"] is None


def test_budgets_and_texts_are_judged_apart() -> None:
    four = cell("gsr4", 0.1, bits=4.25) | {"bits": 4}
    assert [(one["bits"], one["best"]) for one in verdict([cell("gsr", 0.2), four], ORIGINAL)] == [
        (2, "gsr"),
        (4, "gsr4"),
    ]
