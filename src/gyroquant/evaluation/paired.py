"""Models against each other: differences on the same windows, and who is beaten by nobody of as few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gyroquant.evaluation.perplexity import interval

LEVEL = 0.05
"""A p below it is significant."""

_EXHAUSTIVE = 13  # windows whose signs are turned in all ways
_TURNS = 10_000  # of more windows


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Whether two models differ on the same windows: the mean difference in nats a token, the interval of 95 % from a
    bootstrap over windows, and the two-sided p of a test that turns the signs of windows' differences at random.

    That test is exact however few windows there are: of n the smallest p is 2^(1 - n). `significant` is p < 0.05. It is
    for two models that were named beforehand; for the best of several there is `max_t`. Raises ValueError for losses
    that are not finite.
    """
    gaps = _gaps([first], second)
    (p,) = _turned(gaps, seed).tolist()
    spread = list(interval(gaps[0], 1, seed))
    return {"difference": float(gaps.mean()), "interval": spread, "p": p, "significant": p < LEVEL}


def max_t(candidates: Mapping[str, Sequence[float]], against: Sequence[float], seed: int = 0) -> dict[str, float]:
    """The two-sided p of each candidate's difference from one model on the same windows, adjusted for there being
    several: one of them is called different by mistake in at most as many of all comparisons as p says.

    Westfall and Young's single-step max-T ("Resampling-Based Multiple Testing", 1993) over turnings of the signs of
    windows, the same for all candidates, whose dependence is so accounted for. Differences are divided by their root
    mean square: a candidate that is worse by nats would otherwise, turned, outdo whatever the others gain. As turning
    leaves that root as it is, this orders as Student's t does and has no deviation of zero to divide by. With one
    candidate it is `paired`. Raises ValueError for losses that are not finite.
    """
    if not candidates:
        return {}
    return dict(zip(candidates, _turned(_gaps(list(candidates.values()), against), seed).tolist(), strict=True))


def _gaps(first: Sequence[Sequence[float]], second: Sequence[float]) -> Tensor:
    """Differences in every window, shape (models, windows), fp64."""
    gaps = torch.tensor([list(one) for one in first], dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    if not gaps.isfinite().all():
        raise ValueError("losses that are not finite cannot be compared")
    return gaps


def _turned(gaps: Tensor, seed: int) -> Tensor:
    """How often the largest mean of all rows is as far from 0 as each row's when the signs of windows are turned.

    `gaps` has shape (models, windows), the result (models,). Signs are turned in all ways, or in as many at random and
    not at all. Means are in units of a row's root mean square, from 0 to 1.
    """
    count = gaps.shape[1]
    if count <= _EXHAUSTIVE:
        signs = 1 - 2 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(0, 2, (_TURNS, count), generator=generator)
        signs[0] = 1
    sizes = gaps.abs().amax(1, keepdim=True)
    units = gaps / torch.where(sizes > 0, sizes, 1.0)  # first, that squares neither overflow nor vanish
    roots = units.square().mean(1, keepdim=True).sqrt()
    units = units / torch.where(roots > 0, roots, 1.0)
    largest = (signs.double() @ units.T / count).abs().amax(1)
    reached = units.mean(1).abs()
    return (largest[:, None] >= reached * (1 - 1e-12)).double().mean(0)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The keys of which no other has both fewer bits and a smaller gap, by their bits; points are (bits, gap)."""
    kept: list[str] = []
    lowest = math.inf
    for key in sorted(points, key=lambda key: (points[key], key)):
        if points[key][1] < lowest:
            kept.append(key)
            lowest = points[key][1]
    return kept
