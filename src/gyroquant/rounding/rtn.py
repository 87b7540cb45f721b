"""Round to nearest: every weight to the closest number of its group's grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from gyroquant.grids import Grid, GroupParams, QuantizedWeight
from gyroquant.grids.exact import is_given_back
from gyroquant.rounding.base import InputStatistics, Solver, Warn

_PIECE = 1 << 23
_SAMPLE = 16  # rows that are looked at first


class RoundToNearest(Solver):
    """No calibration; the baseline of everything else."""

    name: Literal["rtn"] = "rtn"

    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None = None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        columns = weight.shape[1]
        size = grid.group_of(columns)
        codes, params = [], []
        for piece in weight.split(max(1, _PIECE // columns)):
            groups = piece.reshape(piece.shape[0], columns // size, size)
            params.append(grid.fit(groups))
            codes.append(grid.encode(groups, params[-1]).view(piece.shape))
        scale, zero = torch.cat([p.scale for p in params]), torch.cat([p.zero for p in params])
        return QuantizedWeight(grid, torch.cat(codes), GroupParams(scale, zero))


def rows_on_grid(weight: Tensor, rounded: QuantizedWeight) -> Tensor:
    """Which rows of a matrix, shape (out, in), are not all zero and lie on the grid already, so that rounding to
    nearest gave them back but for what 16 bits keep of a number; bool of shape (out,).
    """
    groups = weight.view(len(weight), rounded.params.scale.shape[1], -1)
    same = is_given_back(rounded.grid, groups, rounded.params).flatten(1).all(1)
    return same & weight.any(1)


def on_grid(weight: Tensor, grid: Grid) -> tuple[Tensor, QuantizedWeight] | None:
    """The rows that lie on a grid already, and the matrix rounded to nearest; None if none of a few rows does. `grid`
    is bound to the matrix. Grids that take the range of a group look for the scale here, too.
    """
    searching = grid.model_copy(update={"scale": "mse"}) if "scale" in type(grid).model_fields else grid
    some = weight[torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLE)).long()]
    if not bool(rows_on_grid(some, RoundToNearest().solve(some, searching)).any()):
        return None
    nearest = replace(RoundToNearest().solve(weight, searching), grid=grid)
    return rows_on_grid(weight, nearest), nearest
