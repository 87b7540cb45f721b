"""The search for a scale and a zero point that is any number, for evenly spaced numbers (NeUQI, arXiv 2505.17595).

For a fixed scale, the squared error of a group is a piecewise quadratic function of the zero point. Pieces meet where a
weight changes its code. So the best zero point is found exactly: sort these places, update the coefficients of the
quadratic at each of them, and take the piece with the lowest vertex. The paper sorts all ``2^bits - 1`` places of every
weight. Here only a window of zero points is searched, which always holds a best one, and the places repeat with a
period of one step. So one sort of the weights is enough, for any number of bits.

The scale is searched from coarse to fine. The error is not a convex function of it, so that search is not exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_RATIO = 0.85  # of neighbouring scales in the coarse pass
_LEAST = 0.02  # the smallest scale that is tried, as a share of the scale without clipping
_WORSE = 1.3  # a group tries no smaller scales once its error is this many times its least one
_FINE = (_RATIO ** (-1 / 3), _RATIO ** (1 / 3))  # factors on the best scale of the coarse pass
_ALTERNATIONS = 3  # rounds of least squares for scale and zero point, and new codes
_QUICK = (1.0, 0.8, 0.64, 0.5)  # scales of the quick search
_EDGE = 1e-3  # of a step; the ends of the window may be off by this much
_PIECE = 1 << 14  # weights that are searched at once, so that they stay in the processor's cache


def best_zero(groups: Tensor, scale: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The zero points of least squared error for fixed scales, and these errors in squared steps.

    groups: weights, shape (groups, n), fp32 or fp64. They should be centred, so that differences keep their precision.
    scale: shape (groups, 1), positive.
    levels: the largest code; the smallest is 0.
    """
    n, low, high = groups.shape[1], groups.amin(1, keepdim=True) / scale, groups.amax(1, keepdim=True) / scale
    # Half a step beyond a zero point at which both ends of the group lie within the codes, or at which the codes lie
    # within the group, the outermost code is not used, and a zero point one step nearer is at least as good.
    start = torch.minimum(-low, levels - high) - 0.5
    width = max(1, math.ceil(float((high - low).amax()) - levels + 1 - _EDGE)) if len(groups) else 1
    steps = groups / scale + start
    code = steps.round()
    order = (code - steps).argsort(1)  # in which the weights pass the next place, half a step above their code
    steps, code = steps.gather(1, order), code.gather(1, order)
    distance = steps - code.clamp(0, levels)
    left = code[:, None] + torch.arange(width, device=groups.device)[:, None]  # the codes that are left, place by place
    moves = ((left >= 0) & (left < levels)).to(groups)
    linear = torch.cat([distance.sum(1, keepdim=True), -moves.flatten(1)], 1).cumsum(1)
    changes = left.sub_(steps[:, None]).mul_(2).add_(1).mul_(moves).flatten(1)
    square = torch.cat([distance.square().sum(1, keepdim=True), changes], 1).cumsum(1)
    error = square.addcmul_(linear, linear, value=-1 / n)  # at the vertices
    best = error.argmin(1, keepdim=True)
    return start - linear.gather(1, best) / n, error.gather(1, best).clamp_min(0)


def search(groups: Tensor, levels: int, quick: bool = False) -> tuple[Tensor, Tensor]:
    """Scales and zero points of small squared error for groups of finite weights, shape (groups, n), fp32.

    Both have shape (groups, 1). Scales are positive. Groups of equal weights get an arbitrary scale. `quick` tries few
    scales and zero points.
    """
    found = [_search_piece(piece, levels, quick) for piece in groups.split(max(1, _PIECE // groups.shape[1]))]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search_piece(groups: Tensor, levels: int, quick: bool) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    middle = low + (high - low) / 2
    full = ((high - low) / levels).clamp_min(1e-37)
    unit = (groups - middle) / full  # in steps of the scale that clips nothing, so that squares stay in reach
    share, zero = _few(unit, levels) if quick else _many(unit, levels)
    return full * share, zero - middle / (full * share)


def _many(unit: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point for centred weights, in steps of the scale that clips nothing."""
    error = torch.full_like(unit[:, :1], math.inf)
    share, zero = torch.ones_like(error), torch.zeros_like(error)

    def attempt(rows: Tensor, scale: Tensor) -> Tensor:
        """Tries one scale for each of these groups. Returns which of them may still get better."""
        tried, squares = best_zero(unit[rows], scale, levels)
        squares *= scale.square()
        better, before = squares < error[rows], error[rows]
        error[rows] = torch.where(better, squares, before)
        share[rows], zero[rows] = torch.where(better, scale, share[rows]), torch.where(better, tried, zero[rows])
        return rows[(squares <= _WORSE * error[rows])[:, 0]]

    every = torch.arange(len(unit), device=unit.device)
    rows, factor = every, 1.0
    while len(rows) and factor > _LEAST:
        rows = attempt(rows, torch.full_like(error[rows], factor))
        factor *= _RATIO
    coarse = share.clone()
    for fine in _FINE:
        attempt(every, (coarse * fine).clamp(max=1))
    return _alternated(unit, share, zero, levels)


def _few(unit: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The same from a few scales, with the middle of the codes on the middle of the range at first."""
    found: list[tuple[Tensor, Tensor]] = []
    for factor in _QUICK:
        share = torch.full_like(unit[:, :1], factor)
        found.append(_alternated(unit, share, torch.full_like(share, levels / 2), levels))
    errors = torch.cat([_squared_error(unit, share, zero, levels) for share, zero in found], 1)
    best = errors.argmin(1, keepdim=True)
    return torch.cat([s for s, _ in found], 1).gather(1, best), torch.cat([z for _, z in found], 1).gather(1, best)


def _codes(unit: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    return (unit / scale).add_(zero).round_().clamp_(0, levels)


def _squared_error(unit: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    return (_codes(unit, scale, zero, levels).sub_(zero).mul_(scale) - unit).square_().sum(1, keepdim=True)


def _alternated(unit: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Least squares for scale and zero point with fixed codes, then new codes, in turn. The error never grows."""
    mean = unit.mean(1, keepdim=True)
    for _ in range(_ALTERNATIONS):
        codes = _codes(unit, scale, zero, levels)
        centre = codes.mean(1, keepdim=True)
        codes -= centre
        slope = (codes * (unit - mean)).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True)
        usable = slope.isfinite() & (slope > 0)  # all codes may be equal
        scale = torch.where(usable, slope, scale)
        zero = torch.where(usable, centre - mean / scale, zero)
    return scale, zero
