"""GPTQ (Frantar et al., arXiv 2210.17323): rounds column after column and compensates each error in later columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids import Grid, GroupParams, QuantizedWeight
from gyroquant.rounding.base import InputStatistics, Solver, Warn
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.two_sided import round_columns

_BLOCK = 128


class ColumnSolver(Solver):
    """Solvers that round one column after another and compensate each error in the columns that are not rounded yet.

    Columns that are zero in all calibration tokens are rounded to nearest.

    - `act_order`: whether columns are taken by falling second moment. Default false. It turns static groups on, because
      the stored groups keep their columns.
    - `static_groups`: whether all scales are fitted before the sweep. By default, the scales of a group are fitted when
      the sweep reaches the group, on weights that already compensate the errors of earlier columns.
    """

    needs_statistics = True
    act_order: bool = False
    static_groups: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ColumnSolver:
        if self.act_order and self.static_groups is False:
            raise ValueError("act_order needs static_groups: true, because the stored groups keep their columns")
        return self

    def conflicts(self, sections: Sequence[str], grids: Sequence[Grid]) -> str:
        tiled = [grid for grid in grids if grid.tile_columns > 1]
        if self.act_order and tiled:
            return f"the grid {tiled[0].grid} codes neighbouring columns together: leave act_order out"
        return super().conflicts(sections, grids)

    @abstractmethod
    def damping(self, gram: Tensor) -> float:
        """The number added to the diagonal of the second moments, divided by the mean of the diagonal."""

    def corrected(self, weight: Tensor, input_error_cross: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The correction of an input error: the weights to start from, shape (out, in), and the `feed` of the sweep.

        `factor` is the U of `inverse_factor`. All three have their columns in the order of the sweep.
        """
        return weight, None

    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        if statistics is None:
            raise InputError(f"{self.name} needs calibration text: give --text, or use the solver rtn")
        gram, order = statistics.second_moments, self.order(statistics.second_moments)
        factor = inverse_factor(gram[order][:, order] if self.act_order else gram, self.damping(gram), warn)
        start, feed = weight, None
        if statistics.input_error_cross is not None:
            start, feed = self.corrected(weight[:, order], statistics.input_error_cross[order][:, order], factor)
            start = start[:, order.argsort()]
        outputs = None
        if self.uses_gradient_moments and statistics.gradient_moments is not None:
            outputs = inverse_factor(statistics.gradient_moments, 0.0, warn)
        return Sweep(start, grid, order, bool(self.static_groups or self.act_order), outputs).run(factor, feed)

    def order(self, gram: Tensor) -> Tensor:
        """The indices of the columns in the order of rounding, for second moments of shape (columns, columns)."""
        if self.act_order:
            return torch.argsort(gram.diagonal(), descending=True, stable=True)
        return torch.arange(gram.shape[0], device=gram.device)


class Gptq(ColumnSolver):
    """GPTQ with lazy updates.

    - `damp_percent`: the share of the mean second moment that is added to the diagonal. Default 0.01.
    """

    name: Literal["gptq"] = "gptq"
    uses_gradient_moments = True
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(act_order=True), cls(static_groups=True)]

    def damping(self, gram: Tensor) -> float:
        return self.damp_percent


class Sweep:
    """The state of one pass over the columns. Weights are held transposed, so that a column is contiguous.

    Columns that a grid codes together get their codes when the first of them is reached. Errors are then fed back from
    one column after the other, as always (block LDLQ of QuIP#, arXiv 2402.04396).

    With `outputs`, the U of `inverse_factor` for the gradient moments, errors are also fed back down the rows of each
    column (`rounding.two_sided`).
    """

    def __init__(self, weight: Tensor, grid: Grid, order: Tensor, static: bool, outputs: Tensor | None = None):
        rows, columns = weight.shape
        self.outputs = outputs
        self.grid, self.order, self.static = grid, order, static
        self.size = grid.group_of(columns)
        self.together, self.tile = grid.stored_together(columns), grid.tile_columns
        # Blocks hold whole groups, so that a group is always fitted on weights that compensate every earlier error.
        whole = self.size * grid.super_block
        self.step = _BLOCK if whole >= columns else max(whole, _BLOCK // whole * whole)
        if outputs is not None and not static and whole < columns:
            self.step = whole  # the scales of all columns of a block are then fitted before it is rounded
        self.free = weight.T[order].contiguous().float()
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        groups = columns // self.size
        if static:
            self.params = grid.fit(weight.reshape(rows, groups, self.size).float())
        else:
            blank = torch.zeros(rows, groups, 1, device=weight.device)
            self.params = GroupParams(blank, blank.clone())

    def block(self, start: int, stop: int, factor: Tensor, feed: Tensor | None) -> None:
        """Rounds columns start..stop. Errors change the rest of the block at once, later blocks in one product."""
        if self.outputs is not None:
            self._two_sided_block(start, stop, factor, self.outputs)
            return
        errors = torch.empty(stop - start, self.free.shape[1], device=self.free.device)
        coded = numbers = torch.empty(0)
        rows = factor[start:stop].float()
        for i in range(start, stop):
            column = int(self.order[i])
            group = column // self.size
            self._fit(i)
            params, tile = self.params[:, group], i % self.tile
            if tile == 0:
                coded = self.grid.encode(self.free[i : i + self.tile].T.contiguous(), params)
                numbers = self.grid.decode(coded, params)
            self.codes[column] = coded[:, tile]
            error = (self.free[i] - numbers[:, tile]) / rows[i - start, i]
            self.free[i + 1 : stop].addr_(rows[i - start, i + 1 : stop], error, alpha=-1)
            if feed is not None:
                self.free[i + 1 : stop].addr_(feed[i, i + 1 : stop], self.free[i])
            errors[i - start] = error
        self.free[stop:].addmm_(rows[:, stop:].T, errors, alpha=-1)
        if feed is not None:
            self.free[stop:].addmm_(feed[start:stop, stop:].T, self.free[start:stop])

    def _fit(self, column: int) -> None:
        """Fits the scales of the groups that begin at a column, unless they are static or none begins there."""
        if self.static or column % (self.size * self.grid.super_block):
            return
        first, count = column // self.size, self.grid.super_block
        if first % self.together:
            fitted = self.grid.refit(self._groups(column, count), self.params, first)
        elif self.together == count:
            fitted = self.grid.fit(self._groups(column, count))
        else:  # the number of the row, which all its super-blocks share
            shared = self.grid.fit_shared(self._groups(column, self.together))
            self.params = GroupParams(shared.scale.clone(), shared.zero.clone())
            fitted = self.grid.refit(self._groups(column, count), self.params, first)
        groups = slice(first, first + count)
        self.params.scale[:, groups], self.params.zero[:, groups] = fitted.scale, fitted.zero

    def _groups(self, column: int, count: int) -> Tensor:
        """The weights of some groups from a column on, as they are now, shape (rows, groups, group)."""
        return self.free[column : column + self.size * count].T.unflatten(1, (count, self.size))

    def _two_sided_block(self, start: int, stop: int, factor: Tensor, outputs: Tensor) -> None:
        """As `block`, with errors fed back on both sides."""
        self._fit(start)
        tiles = self.order[start : stop : self.tile] // self.size
        free, inputs = self.free[start:stop], factor[start:stop, start:stop]
        codes, errors = round_columns(free, self.grid, self.params[:, tiles], inputs, outputs)
        self.codes[self.order[start:stop]] = codes
        self.free[stop:].addmm_(factor[start:stop, stop:].T.float(), errors, alpha=-1)

    def run(self, factor: Tensor, feed: Tensor | None = None) -> QuantizedWeight:
        """Rounds every column. `factor` is that of the inverse second moments, in the order of the sweep.

        With `feed`, same shape, fp32, each column before rounding, times its row of `feed`, is added to later columns.
        """
        columns = len(self.order)
        for start in range(0, columns, self.step):
            self.block(start, min(columns, start + self.step), factor, feed)
        return QuantizedWeight(self.grid, self.codes.T.contiguous(), self.params)
