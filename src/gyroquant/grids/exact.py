"""Weights that already lie on a grid with some scale: ternary weights, or those of a model that was rounded before.

A search for the least squared error that only narrows ranges does not find the scale of such a group, unless its
largest weight lies on the outermost number. There are few possible scales, because the largest weight is one of the
grid's numbers. One of them is taken only if it reproduces *every* weight of the group. Weights that lie on no grid thus
keep the scale that the search found, and published results stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.grids.base import Grid, GroupParams, lift

# How far a weight may be from the number that stands for it: the relative rounding errors of bfloat16 (the weight) and
# fp16 (the scale), and a part of a step for what errors of other groups added (a rounded weight is off by 0.29 steps).
_RELATIVE = 2.0**-9 + 2.0**-11
_STEPS = 2.0**-6
_LARGEST = 2.0**-4  # upper limit of the relative part, in steps, so that random weights do not pass
_PROBED = 8  # weights of a group that are tested first
# With more than _MANY candidates, a sample of groups is tested first. If none is on the grid, the rest is skipped.
_MANY, _SAMPLE = 64, 256
_PIECE = 1 << 22


def is_given_back(grid: Grid, weights: Tensor, params: GroupParams, relative: float = _RELATIVE) -> Tensor:
    """Whether each weight, shape (..., k), equals its nearest number, up to the rounding of weight and scale.

    Returns bool of shape (..., k). `params` may have any shape that broadcasts with the weights.
    """
    numbers = grid.nearest(weights, params)
    steps = grid.group_step_below(numbers / params.scale, params) * params.scale.abs()
    return (numbers - weights).abs() <= torch.minimum(relative * weights.abs(), _LARGEST * steps) + _STEPS * steps


def prefer_exact(grid: Grid, groups: Tensor, found: GroupParams, tried: GroupParams) -> GroupParams:
    """For each group, the first candidate of `tried` that reproduces the whole group, else `found`.

    `groups` has shape (..., n), `found` holds their parameters, `tried` has shape (..., candidates). A candidate must
    also have a smaller error than `found`. `tried` need not be storable: its scales are fitted to the numbers and
    rounded first.
    """
    n, candidates = groups.shape[-1], tried.scale.shape[-1]
    flat, old = groups.reshape(-1, n), GroupParams(found.scale.reshape(-1, 1), found.zero.reshape(-1, 1))
    tried = GroupParams(tried.scale.reshape(-1, candidates), tried.zero.reshape(-1, candidates))
    if candidates > _MANY and len(flat) > 2 * _SAMPLE:
        sample = torch.linspace(0, len(flat) - 1, _SAMPLE, device=flat.device).long()
        if not len(_exact(grid, flat[sample], old[sample], tried[sample])[0]):
            return found
    scales, zeros = old.scale.clone(), old.zero.clone()
    step = max(1, _PIECE // max(candidates, n))
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        exact, better = _exact(grid, flat[rows], old[rows], tried[rows])
        scales[start + exact], zeros[start + exact] = better.scale, better.zero
    return GroupParams(scales.view(found.scale.shape), zeros.view(found.zero.shape))


def _exact(grid: Grid, groups: Tensor, found: GroupParams, tried: GroupParams) -> tuple[Tensor, GroupParams]:
    """The indices of the groups, shape (groups, n), that a candidate reproduces, and their new parameters."""
    probes = groups[:, torch.linspace(0, groups.shape[1] - 1, _PROBED, device=groups.device).long()]
    sizes = probes.abs()  # the smallest weight has the tightest tolerance, so few candidates pass it
    smallest = probes.gather(1, torch.where(sizes > 0, sizes, torch.inf).argmin(1, keepdim=True))
    probed = is_given_back(grid, smallest, tried, 2 * _RELATIVE) & groups.any(1, keepdim=True)
    row, which = probed.nonzero(as_tuple=True)
    kept = is_given_back(grid, probes[row], _paired(tried, row, which), 2 * _RELATIVE).all(1)
    row, which = row[kept], which[kept]
    done, scales, zeros = [row[:0]], [found.scale[:0]], [found.zero[:0]]
    while len(row):
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        index, weights = row[first], groups[row[first]]
        before, wanted = found[index], _paired(tried, index, which[first])
        fitted = grid.least_squares(
            weights, (grid.round_params(wanted.scale, wanted.zero), _fitted(grid, weights, wanted))
        )
        exact = is_given_back(grid, weights, fitted).all(1) & (
            _error(grid, weights, fitted) < _error(grid, weights, before)
        )
        done.append(index[exact])
        scales.append(fitted.scale[exact])
        zeros.append(fitted.zero[exact])
        left = ~first & ~torch.isin(row, index[exact])
        row, which = row[left], which[left]
    return torch.cat(done), GroupParams(torch.cat(scales), torch.cat(zeros))


def _paired(tried: GroupParams, row: Tensor, which: Tensor) -> GroupParams:
    return GroupParams(tried.scale[row, which, None], tried.zero[row, which, None])


def _fitted(grid: Grid, groups: Tensor, params: GroupParams) -> GroupParams:
    """The storable parameters nearest to the scale of least squared error, with every weight at its nearest number."""
    steps = grid.nearest(groups, params) / params.scale
    scale = (groups * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
    return grid.round_params(torch.where(scale.isfinite(), scale, params.scale), params.zero)


def _error(grid: Grid, groups: Tensor, params: GroupParams) -> Tensor:
    return ((grid.nearest(groups, params) - groups) * lift(groups)).square().sum(-1)
