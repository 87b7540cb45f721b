"""Comparisons of models: paired tests on the same windows or items, and the Pareto front of bits and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from gyroquant.evaluation.perplexity import interval

LEVEL = 0.05
"""A difference is significant if its p is below this."""

_EXHAUSTIVE = 13  # up to this many windows, all combinations of signs are tried
_FLIPS = 10_000  # random combinations for more windows


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Whether two models differ on the same windows, from the loss of each window in nats a token.

    - difference: the mean difference in nats a token.
    - interval: its 95 % interval, from a bootstrap over windows.
    - p: two-sided, from a test that flips the signs of the windows' differences. The test is exact with any number of
      windows; with n windows the smallest possible p is 2^(1 - n).
    - significant: p < 0.05.

    The two models must be chosen before they are measured; for the best of several use `max_t`. Raises ValueError for
    losses that are not finite.
    """
    gaps = _gaps([first], second)
    (p,) = _p_values(gaps, seed).tolist()
    bounds = list(interval(gaps[0], 1, seed))
    return {"difference": float(gaps.mean()), "interval": bounds, "p": p, "significant": p < LEVEL}


def max_t(candidates: Mapping[str, Sequence[float]], against: Sequence[float], seed: int = 0) -> dict[str, float]:
    """The two-sided p of each candidate's difference from one model on the same windows, adjusted for their number.

    p limits the share of comparisons in which any candidate is called different by mistake. The method is Westfall and
    Young's single-step max-T ("Resampling-Based Multiple Testing", 1993). The signs of windows are flipped in the same
    way for all candidates, which accounts for their dependence. Differences are divided by their root mean square:
    otherwise a candidate that is worse by nats would, with flipped signs, exceed every gain of the others. Flipping
    does not change that root, so the order is that of Student's t, and there is no division by a deviation of zero.
    With one candidate the result is that of `paired`. Raises ValueError for losses that are not finite.
    """
    if not candidates:
        return {}
    return dict(zip(candidates, _p_values(_gaps(list(candidates.values()), against), seed).tolist(), strict=True))


def _gaps(first: Sequence[Sequence[float]], second: Sequence[float]) -> Tensor:
    """The difference in every window, shape (models, windows), fp64."""
    ours, theirs = (torch.tensor(losses, dtype=torch.float64) for losses in ([list(row) for row in first], second))
    gaps = ours - theirs
    if not gaps.isfinite().all():
        raise ValueError("losses that are not finite cannot be compared: leave that model out")
    return gaps


def _p_values(gaps: Tensor, seed: int) -> Tensor:
    """For each row, how often the largest mean of all rows is as far from 0 as this row's, when signs are flipped.

    `gaps` has shape (models, windows), the result (models,). All combinations of signs are tried, or random ones and
    the unchanged signs. Means are in units of a row's root mean square, from 0 to 1.
    """
    count = gaps.shape[1]
    if count <= _EXHAUSTIVE:
        signs = 1 - 2 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(0, 2, (_FLIPS, count), generator=generator)
        signs[0] = 1
    sizes = gaps.abs().amax(1, keepdim=True)
    units = gaps / torch.where(sizes > 0, sizes, 1.0)  # first, so that squares neither overflow nor underflow
    roots = units.square().mean(1, keepdim=True).sqrt()
    units = units / torch.where(roots > 0, roots, 1.0)
    largest = (signs.double() @ units.T / count).abs().amax(1)
    reached = units.mean(1).abs() - 1e-12  # sums of the same differences in another order are equal, also those of 0
    return (largest[:, None] >= reached).double().mean(0)


def mcnemar(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """Whether the accuracies of two models differ on the same items, from 1 for each right answer and 0 for others.

    - difference: the accuracy of `first` minus that of `second`.
    - interval: its 95 % interval, Wald's with one item more in each cell of the table (Bonett and Price, "Adjusted Wald
      confidence interval for a difference of binomial proportions based on paired data", 2012). It is not empty where
      all answers are the same.
    - p: two-sided, McNemar's exact test. It is the limit of `paired` with all combinations of signs: only items that
      one model alone gets right count, and by chance each is as likely to be of the one as of the other.
    - significant: p < 0.05.
    - gained, lost: how many items only `first`, and only `second`, gets right.

    Raises ValueError for other numbers than 0 and 1, and for different numbers of items.
    """
    if len(first) != len(second) or not first or not set(first) | set(second) <= {0, 1}:
        raise ValueError("answers to compare are 1 (right) or 0 (wrong), as many for one model as for the other")
    count = len(first)
    gained = sum(ours > theirs for ours, theirs in zip(first, second, strict=True))
    lost = sum(ours < theirs for ours, theirs in zip(first, second, strict=True))
    differing = gained + lost
    tail = sum(math.comb(differing, fewer) for fewer in range(min(gained, lost) + 1)) / 2**differing
    p = min(1.0, 2 * tail)
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return {
        "difference": (gained - lost) / count,
        "interval": [max(-1.0, up - down - reach), min(1.0, up - down + reach)],
        "p": p,
        "significant": p < LEVEL,
        "gained": gained,
        "lost": lost,
    }


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The keys for which no other key has both fewer bits and a smaller gap, by bits. `points` are (bits, gap)."""
    kept: list[str] = []
    lowest = math.inf
    for key in sorted(points, key=lambda key: (points[key], key)):
        if points[key][1] < lowest:
            kept.append(key)
            lowest = points[key][1]
    return kept
