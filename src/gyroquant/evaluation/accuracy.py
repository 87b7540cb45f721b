"""The share of right answers with its standard error and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any


def accuracy(right: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """The mean of 1 for each right answer and 0 for a wrong one.

    - acc: the accuracy.
    - stderr: its standard error, as lm-evaluation-harness has it: the sample's deviation over the root of the number.
    - interval: its 95 % interval, Wilson's score interval ("Probable inference", 1927), also good near 0 and 1.

    Raises ValueError for fewer than two answers.
    """
    count = len(right)
    if count < 2:
        raise ValueError("an accuracy with a standard error needs at least two answers")
    mean = sum(right) / count
    return {
        "acc": mean,
        "stderr": math.sqrt(mean * (1 - mean) / (count - 1)),
        "interval": list(wilson(mean, count, level)),
    }


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` answers."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))  # at 0 and 1 sums are not exact


__all__ = ["accuracy", "wilson"]
