"""GPTQ (Frantar et al., arXiv 2210.17323): columns in turn, each one's error passed on to those still free."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids import Grid, GroupParams, QuantizedWeight
from gyroquant.rounding.base import InputStatistics, Solver, Warn
from gyroquant.rounding.factor import inverse_factor

_BLOCK = 128


class ColumnSolver(Solver):
    """Solvers that take columns in turn, each one's error passed on to those still free.

    Scales are fitted when a group's turn comes, on weights that already carry the errors of earlier columns, or before
    (`static_groups`). `act_order` takes columns by falling second moment; it needs static groups, since the stored
    groups stay in place, and turns them on. Columns that no calibration token reaches are rounded to nearest.
    """

    needs_statistics = True
    act_order: bool = False
    static_groups: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ColumnSolver:
        if self.act_order and self.static_groups is False:
            raise ValueError("act_order needs static_groups: true, since the stored groups stay in place")
        return self

    @abstractmethod
    def damping(self, gram: Tensor) -> float:
        """What is added to the diagonal of the second moments, over the mean of the diagonal."""

    def corrected(self, weight: Tensor, drift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a drift of the input changes: the weights to start from, shape (out, in), and the `feed` of the sweep.

        `factor` is the U of `inverse_factor`; all have their columns in the order of the sweep.
        """
        return weight, None

    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        if statistics is None:
            raise InputError(f"{self.name} needs calibration text: give --text, or use the solver rtn")
        gram, order = statistics.gram, self.order(statistics.gram)
        factor = inverse_factor(gram[order][:, order] if self.act_order else gram, self.damping(gram), warn)
        start, feed = weight, None
        if statistics.drift is not None:
            start, feed = self.corrected(weight[:, order], statistics.drift[order][:, order], factor)
            start = start[:, order.argsort()]
        return Sweep(start, grid, order, bool(self.static_groups or self.act_order)).run(factor, feed)

    def order(self, gram: Tensor) -> Tensor:
        """The columns in the order in which they are rounded, for second moments of shape (columns, columns)."""
        if self.act_order:
            return torch.argsort(gram.diagonal(), descending=True, stable=True)
        return torch.arange(gram.shape[0], device=gram.device)


class Gptq(ColumnSolver):
    """GPTQ with lazy updates."""

    name: Literal["gptq"] = "gptq"
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01

    def damping(self, gram: Tensor) -> float:
        return self.damp_percent


class Sweep:
    """The state of one pass over the columns; weights are held transposed, so that a column lies together."""

    def __init__(self, weight: Tensor, grid: Grid, order: Tensor, static: bool):
        rows, columns = weight.shape
        self.grid, self.order, self.static = grid, order, static
        self.size = grid.group_of(columns)
        # Blocks hold whole groups, so that a group is always fitted on weights that carry every earlier error.
        self.step = _BLOCK if self.size >= columns else max(self.size, _BLOCK // self.size * self.size)
        self.free = weight.T[order].contiguous().float()
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        groups = columns // self.size
        if static:
            self.params = grid.fit(weight.reshape(rows, groups, self.size).float())
        else:
            blank = torch.zeros(rows, groups, 1, device=weight.device)
            self.params = GroupParams(blank, blank.clone())

    def block(self, start: int, stop: int, factor: Tensor, feed: Tensor | None) -> None:
        """Rounds columns start..stop and passes their errors on, within the block at once, beyond it in one product."""
        errors = torch.empty(stop - start, self.free.shape[1], device=self.free.device)
        rows = factor[start:stop].float()
        for i in range(start, stop):
            column = int(self.order[i])
            group = column // self.size
            if not self.static and i % self.size == 0:
                fitted = self.grid.fit(self.free[i : i + self.size].T)
                self.params.scale[:, group], self.params.zero[:, group] = fitted.scale, fitted.zero
            params = self.params[:, group]
            code = self.grid.encode(self.free[i, :, None], params)
            self.codes[column] = code[:, 0]
            error = (self.free[i] - self.grid.decode(code, params)[:, 0]) / rows[i - start, i]
            self.free[i + 1 : stop].addr_(rows[i - start, i + 1 : stop], error, alpha=-1)
            if feed is not None:
                self.free[i + 1 : stop].addr_(feed[i, i + 1 : stop], self.free[i])
            errors[i - start] = error
        self.free[stop:].addmm_(rows[:, stop:].T, errors, alpha=-1)
        if feed is not None:
            self.free[stop:].addmm_(feed[start:stop, stop:].T, self.free[start:stop])

    def run(self, factor: Tensor, feed: Tensor | None = None) -> QuantizedWeight:
        """Rounds every column, given the factor of the inverse second moments in the sweep's order.

        With `feed`, of the same shape, fp32, each column as it was before rounding, times its row of `feed`, is added
        to those that come after it.
        """
        columns = len(self.order)
        for start in range(0, columns, self.step):
            self.block(start, min(columns, start + self.step), factor, feed)
        return QuantizedWeight(self.grid, self.codes.T.contiguous(), self.params)
