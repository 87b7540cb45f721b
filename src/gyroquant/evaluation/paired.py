"""Models against each other: differences on the same windows, and who is beaten by nobody of as few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gyroquant.evaluation.perplexity import interval

_LEVEL = 0.05
_EXHAUSTIVE = 13  # windows whose signs are turned in all ways
_TURNS = 10_000  # of more windows


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Whether two models differ on the same windows: the mean difference in nats a token, the interval of 95 % from a
    bootstrap over windows, and the two-sided p of a test that turns the signs of windows' differences at random.

    That test is exact however few windows there are: of n the smallest p is 2^(1 - n). `significant` is p < 0.05.
    """
    gaps = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    p = _turned(gaps, seed)
    spread = list(interval(gaps, 1, seed))
    return {"difference": float(gaps.mean()), "interval": spread, "p": p, "significant": p < _LEVEL}


def _turned(gaps: Tensor, seed: int) -> float:
    """How often a mean is as far from 0 when signs are turned: all ways of them, or as many at random, and this one."""
    count = len(gaps)
    if count <= _EXHAUSTIVE:
        signs = 1 - 2 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(0, 2, (_TURNS, count), generator=generator)
        signs[0] = 1
    means = (signs * gaps).mean(1).abs()
    return float((means >= float(gaps.mean().abs()) * (1 - 1e-12)).double().mean())


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The keys of which no other has both fewer bits and a smaller gap, by their bits; points are (bits, gap)."""
    kept: list[str] = []
    lowest = math.inf
    for key in sorted(points, key=lambda key: (points[key], key)):
        if points[key][1] < lowest:
            kept.append(key)
            lowest = points[key][1]
    return kept
