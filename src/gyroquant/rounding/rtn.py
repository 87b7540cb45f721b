"""Round to nearest: every weight to the closest number of its group's grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gyroquant.grids import Grid, GroupParams, QuantizedWeight
from gyroquant.rounding.base import InputStatistics, Solver, Warn

_PIECE = 1 << 23


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
