"""Accuracies have the standard error of the harness, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from gyroquant.evaluation.accuracy import accuracy, wilson


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=200))
def test_an_accuracy_lies_in_its_interval(right: list[float]) -> None:
    facts = accuracy(right)
    low, high = facts["interval"]
    assert facts["acc"] == sum(right) / len(right)
    assert facts["stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
    assert 0 <= low <= facts["acc"] <= high <= 1
    assert high - low > 0
    expected = binomtest(int(sum(right)), len(right)).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("count", [50, 200])
@pytest.mark.parametrize("truth", [0.25, 0.5, 0.8, 0.95])
def test_the_interval_covers_95_percent(count: int, truth: float) -> None:
    """Exactly, from the probability of every number of right answers."""
    covered = sum(
        binom.pmf(right, count, truth)
        for right in range(count + 1)
        if wilson(right / count, count)[0] <= truth <= wilson(right / count, count)[1]
    )
    assert 0.92 < covered < 0.98


def test_one_answer_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="at least two answers"):
        accuracy([1.0])
