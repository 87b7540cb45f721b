"""Round to nearest: each weight becomes the closest number of its group's grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids import Grid, GroupParams, QuantizedWeight
from gyroquant.grids.exact import is_given_back
from gyroquant.rounding.base import InputStatistics, Solver, Warn

_PIECE = 1 << 23
_SAMPLE = 16  # rows that are tried first


class RoundToNearest(Solver):
    """Round to nearest. It needs no calibration."""

    name: Literal["rtn"] = "rtn"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None = None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        columns = weight.shape[1]
        size = grid.group_of(columns)
        codes, params = [], []
        for piece in weight.split(max(1, _PIECE // columns // grid.tile_rows) * grid.tile_rows):
            groups = piece.reshape(piece.shape[0], columns // size, size)
            params.append(grid.fit(groups))
            codes.append(grid.encode(groups, params[-1]).view(piece.shape))
        scale, zero = torch.cat([p.scale for p in params]), torch.cat([p.zero for p in params])
        return QuantizedWeight(grid, torch.cat(codes), GroupParams(scale, zero))


def rows_on_grid(weight: Tensor, rounded: QuantizedWeight) -> Tensor:
    """Which rows of a matrix, shape (out, in), already lie on the grid and are not all zero; bool of shape (out,).

    A row lies on the grid if rounding to nearest returned it, up to the precision of 16-bit numbers.
    """
    groups = weight.view(len(weight), rounded.params.scale.shape[1], -1)
    same = is_given_back(rounded.grid, groups, rounded.params).flatten(1).all(1)
    return same & weight.any(1)


def on_grid(weight: Tensor, grid: Grid) -> tuple[Tensor, QuantizedWeight] | None:
    """The rows that already lie on a grid, and the matrix rounded to nearest. None if none of a few sample rows does.

    Also None for grids that code several weights together. `grid` must have the tensor scale of the matrix. The scale
    is searched here even for grids that take it from the range of a group.
    """
    if not grid.coded_singly:
        return None
    searching = grid.fitted_by("mse")
    sample = weight[torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLE)).long()]
    if not bool(rows_on_grid(sample, RoundToNearest().solve(sample, searching)).any()):
        return None
    nearest = replace(RoundToNearest().solve(weight, searching), grid=grid)
    return rows_on_grid(weight, nearest), nearest
