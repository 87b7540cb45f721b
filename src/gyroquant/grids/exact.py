"""Weights that lie on a grid already, by whatever scale: ternary ones, or those of a model that was rounded before.

A search for the least squared error that only makes ranges narrower never meets the scale of such a group, unless its
largest weight happens to lie on the outermost number. The scales that can be meant are few: the largest weight is one
of the grid's numbers. Of these one is taken where it gives back *every* weight of the group, and nowhere else, so that
weights which lie on no grid keep the scale that the search found for them, and published results stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.grids.base import Grid, GroupParams, lift

# How far a weight may be from the number that stands for it: as far as bfloat16 moved the weight and fp16 the scale,
# and by a share of a step, for what errors of other groups have added to it (a rounded weight is off by 0.29 steps).
_RELATIVE = 2.0**-9 + 2.0**-11
_STEPS = 2.0**-6
_MOST = 2.0**-4  # of a step: more is never allowed, lest chance finds what is not meant
_PROBED = 8  # weights of a group that are looked at first
_MANY, _SAMPLE = 64, 256  # of more candidates than that, not all groups are asked if none of a sample has one
_PIECE = 1 << 22


def is_given_back(grid: Grid, weights: Tensor, params: GroupParams, relative: float = _RELATIVE) -> Tensor:
    """Whether each weight of shape (..., k) is, but for rounding of itself and of the scale, the number nearest to it;
    bool of that shape. `params` may have any shape that goes with it.
    """
    numbers = grid.nearest(weights, params)
    steps = grid.step_below(numbers / params.scale) * params.scale.abs()
    return (numbers - weights).abs() <= torch.minimum(relative * weights.abs(), _MOST * steps) + _STEPS * steps


def prefer_exact(grid: Grid, groups: Tensor, found: GroupParams, tried: GroupParams) -> GroupParams:
    """`found`, parameters of groups of shape (..., n), or where there is one among `tried`, of shape (..., candidates),
    the first that gives back a whole group, with less error than what was found.

    `tried` need not be storable; its scale is fitted to the numbers before it is.
    """
    n, candidates = groups.shape[-1], tried.scale.shape[-1]
    flat, old = groups.reshape(-1, n), GroupParams(found.scale.reshape(-1, 1), found.zero.reshape(-1, 1))
    tried = GroupParams(tried.scale.reshape(-1, candidates), tried.zero.reshape(-1, candidates))
    if candidates > _MANY and len(flat) > 2 * _SAMPLE:
        some = torch.linspace(0, len(flat) - 1, _SAMPLE, device=flat.device).long()
        if not len(_exact(grid, flat[some], old[some], tried[some])[0]):
            return found
    scales, zeros = old.scale.clone(), old.zero.clone()
    step = max(1, _PIECE // max(candidates, n))
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        there, better = _exact(grid, flat[rows], old[rows], tried[rows])
        scales[start + there], zeros[start + there] = better.scale, better.zero
    return GroupParams(scales.view(found.scale.shape), zeros.view(found.zero.shape))


def _exact(grid: Grid, groups: Tensor, found: GroupParams, tried: GroupParams) -> tuple[Tensor, GroupParams]:
    """The numbers of the groups, shape (groups, n), that have such a candidate, and their new parameters."""
    probes = groups[:, torch.linspace(0, groups.shape[1] - 1, _PROBED, device=groups.device).long()]
    sizes = probes.abs()  # the smallest has the least room, so few candidates pass it
    smallest = probes.gather(1, torch.where(sizes > 0, sizes, torch.inf).argmin(1, keepdim=True))
    probed = is_given_back(grid, smallest, tried, 2 * _RELATIVE) & groups.any(1, keepdim=True)
    row, which = probed.nonzero(as_tuple=True)
    kept = is_given_back(grid, probes[row], _paired(tried, row, which), 2 * _RELATIVE).all(1)
    row, which = row[kept], which[kept]
    done, scales, zeros = [row[:0]], [found.scale[:0]], [found.zero[:0]]
    while len(row):
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        here, weights = row[first], groups[row[first]]
        before, wanted = found[here], _paired(tried, here, which[first])
        fitted = grid.least_squares(
            weights, (grid.round_params(wanted.scale, wanted.zero), _fitted(grid, weights, wanted))
        )
        exact = is_given_back(grid, weights, fitted).all(1) & (
            _error(grid, weights, fitted) < _error(grid, weights, before)
        )
        done.append(here[exact])
        scales.append(fitted.scale[exact])
        zeros.append(fitted.zero[exact])
        left = ~first & ~torch.isin(row, here[exact])
        row, which = row[left], which[left]
    return torch.cat(done), GroupParams(torch.cat(scales), torch.cat(zeros))


def _paired(tried: GroupParams, row: Tensor, which: Tensor) -> GroupParams:
    return GroupParams(tried.scale[row, which, None], tried.zero[row, which, None])


def _fitted(grid: Grid, groups: Tensor, params: GroupParams) -> GroupParams:
    """The storable parameters nearest to the scale of least squared error, each weight held by its nearest number."""
    steps = grid.nearest(groups, params) / params.scale
    scale = (groups * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
    return grid.round_params(torch.where(scale.isfinite(), scale, params.scale), params.zero)


def _error(grid: Grid, groups: Tensor, params: GroupParams) -> Tensor:
    return ((grid.nearest(groups, params) - groups) * lift(groups)).square().sum(-1)
