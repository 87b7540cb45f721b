"""Refinement of a rounded matrix at the same size: codes, scales and zero points by coordinate descent.

The objective is the squared error of a layer's output on its calibration tokens, ``|X W^T - Y Q^T|^2``, plus the
damping ``lambda |W - Q|^2``. X are the layer's inputs in the unrounded model, Y those in the rounded model (X = Y if
only Y is known). The objective is quadratic in every stored number. So each can be set to its best value while all
others are fixed: a column of codes (as in QuantEase, arXiv 2309.01885), then the scale of a group, then its zero
point. Where zero points are any numbers (`Grid.float_zero`), the best scale and zero point of a group are found
together. Only changes that lower the objective are made.

On the grid `additive` this is the method of AQLM (arXiv 2401.06118): codebooks, scales and codes in turn. Vectors of
codes are searched by the second moments of their columns, one codebook after another (beam search with a beam of one).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids import AdditiveGrid, GroupParams, QuantizedWeight
from gyroquant.rounding.base import InputStatistics, PreparedWeight, Warn, When
from gyroquant.rounding.steps.base import LayerStep
from gyroquant.rounding.steps.codebooks import best_codebooks

_BLOCK = 64
_ROWS = 1024  # whose super-blocks are refined at once
_RIDGE = 1e-5  # of the mean diagonal of a system: groups whose numbers are all 0 make it singular


class Refine(LayerStep):
    """Refines codes, scales and zero points after the solver.

    - `passes`: the largest number of passes over all columns of codes. Default 4. It ends early when no code changes.
    - `scales`: whether scales and zero points are fitted again before each pass, and codebooks if the grid has them.
      Default true.
    - `tolerance`: it also ends when a pass lowers the objective by less than this share. Default 0.
    - `damp_percent`: the share of the mean second moment that is added to the diagonal. Default 0.01, as in GPTQ.
    """

    key = "refine"
    when = When.AFTER_SOLVER
    needs_statistics = True

    passes: Annotated[int, Field(gt=0, le=100)] = 4
    scales: bool = True
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(passes=1, scales=False)]

    def memory_bytes(self, rows: int, columns: int) -> int:
        return 20 * columns * columns + 20 * rows * columns

    def apply(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        assert prepared.rounded is not None
        descent = _Descent(prepared, self.damp_percent)
        error = descent.error() if self.tolerance else 0.0
        for _ in range(self.passes):
            if self.scales:
                if not prepared.shares_grid:
                    descent.codebooks()
                descent.scales()
            if not descent.codes():
                break
            if self.tolerance:
                last, error = error, descent.error()
                if last - error < self.tolerance * last:
                    break
        rounded = replace(prepared.rounded, grid=descent.grid, codes=descent.code, params=descent.params)
        return replace(prepared, grid=descent.grid, rounded=rounded)

    def run(self, weight: Tensor, rounded: QuantizedWeight, statistics: InputStatistics) -> QuantizedWeight:
        """Refines the codes that a solver chose for `weight`, shape (out, in), fp32, in the basis of the codes."""
        refined = self.apply(PreparedWeight("a weight", weight, statistics, None, rounded.grid, rounded)).rounded
        assert refined is not None
        return refined


class _Descent:
    """Codes, parameters, the numbers that they stand for, and -1/2 times the gradient of the objective."""

    def __init__(self, prepared: PreparedWeight, damp_percent: float):
        weight, rounded, statistics = prepared.matrix, prepared.rounded, prepared.statistics
        self.weight = weight
        assert rounded is not None
        assert statistics is not None
        columns = weight.shape[1]
        self.grid, self.size = rounded.grid, rounded.grid.group_of(columns)
        self.code = rounded.codes.clone()
        self.params = GroupParams(rounded.params.scale.clone(), rounded.params.zero.clone())
        damp = damp_percent * statistics.second_moments.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(columns, device=weight.device)
        tokens = max(statistics.count, 1)  # so that fp32 holds every product for any number of tokens
        self.h = ((statistics.second_moments + damp * eye) / tokens).to(weight)  # moments in another basis are fp64
        wanted = ((statistics.cross + damp * eye) / tokens).to(weight)
        self.number = prepared.decode()
        self.slope = weight @ wanted - self.number @ self.h
        scale, zero = self.params.scale, self.params.zero
        self.zero_moves = not torch.equal(self.grid.round_params(scale, zero + 1).zero, zero)

    def error(self) -> float:
        """The objective, less the part that no code can change."""
        rest = self.weight - self.number
        return float((rest * (2 * self.slope - rest @ self.h)).sum())

    def codebooks(self) -> None:
        """Sets the codebooks of the grid to their best values for these codes, if it has some and that helps."""
        if not isinstance(self.grid, AdditiveGrid):
            return
        grid = best_codebooks(self.grid, self.code, self.params, self.slope, self.h)
        move = QuantizedWeight(grid, self.code, self.params).dequantize() - self.number
        pull = move @ self.h
        if float((move * (2 * self.slope - pull)).sum()) > 0:
            self.grid, self.number, self.slope = grid, self.number + move, self.slope - pull

    def codes(self) -> int:
        """Sets every column of codes to its best values, one column after another; returns how many codes changed."""
        changed = 0
        for group in range(self.params.scale.shape[1]):
            params = self.params[:, group]
            first = group * self.size
            for start in range(first, first + self.size, _BLOCK):
                changed += self._set_codes(start, min(start + _BLOCK, first + self.size), params)
        return changed

    def _set_codes(self, start: int, stop: int, params: GroupParams) -> int:
        slope, h = self.slope[:, start:stop].T.contiguous(), self.h[start:stop, start:stop]
        number = self.number[:, start:stop].T.contiguous()
        code = self.code[:, start:stop].T.contiguous()
        before, curvature = number.clone(), h.diagonal().tolist()
        for i in range(0, stop - start, self.grid.tile_columns):
            if self.grid.tile_columns > 1:
                self._set_tile(slice(i, i + self.grid.tile_columns), code, number, slope, h, params)
                continue
            new = self.grid.encode((number[i] + slope[i] / curvature[i])[:, None], params)
            move = self.grid.decode(new, params)[:, 0] - number[i]
            better = self._tiles(move * (2 * slope[i] - move * curvature[i])) > 0
            move *= better
            code[i] = torch.where(better, new[:, 0], code[i])
            number[i] += move
            slope.addr_(h[i], move, alpha=-1)
        changed = int((self.code[:, start:stop] != code.T).sum())
        self.code[:, start:stop] = code.T
        change = (number - before).T
        self.number[:, start:stop] += change
        self.slope.addmm_(change, self.h[start:stop], alpha=-1)
        return changed

    def _set_tile(
        self, tile: slice, code: Tensor, number: Tensor, slope: Tensor, h: Tensor, params: GroupParams
    ) -> None:
        """As one step of `_set_codes`, for neighbouring columns that have their codes together.

        They get the numbers nearest to the lowest point of the objective, if these lower it. A grid with codebooks
        searches those for which the objective is lowest.
        """
        wanted = number[tile] + torch.linalg.solve(h[tile, tile], slope[tile])
        new = self.grid.encode_by(wanted.T.contiguous(), params, h[tile, tile], code[tile].T.contiguous())
        move = self.grid.decode(new, params).T - number[tile]
        better = (move * (2 * slope[tile] - h[tile, tile] @ move)).sum(0) > 0
        move = move * better
        code[tile] = torch.where(better, new.T, code[tile])
        number[tile] += move
        slope.addmm_(h[:, tile], move, alpha=-1)

    def _tiles(self, gain: Tensor) -> Tensor:
        """The gain of each row, shape (rows,), or that of its tile if rows can only change together."""
        rows = self.grid.tile_rows
        return gain if rows == 1 else gain.view(-1, rows).sum(1).repeat_interleave(rows)

    def scales(self) -> None:
        """Sets the scale of each group to its best value, then its zero point, both rounded to storable values."""
        if self.grid.super_block > 1:
            for group in range(0, self.params.scale.shape[1], self.grid.super_block):
                for start in range(0, len(self.code), _ROWS):
                    self._set_super_block(slice(start, start + _ROWS), group)
            return
        for group in range(self.params.scale.shape[1]):
            scale, zero = self.params.scale[:, group], self.params.zero[:, group]
            if self.grid.float_zero:
                self._change(group, *self._best_line(group))
            else:
                self._change(group, self._best_step(group, self._numbers(group) / scale), torch.zeros_like(zero))
            if not self.zero_moves:
                continue
            scale = self.params.scale[:, group]  # the one that is stored; the zero point follows it
            self._change(group, torch.zeros_like(scale), self._best_step(group, -scale.expand(-1, self.size)))

    def _set_super_block(self, rows: slice, first: int) -> None:
        """Sets the scales and offsets of a super-block together, since they are stored as multiples of one number.

        If the whole row shares that number, it stays.

        The best free ones solve a linear system for each row, of one or two unknowns a group. They are rounded to
        storable values, and taken in the rows where that lowers the objective.
        """
        groups = slice(first, first + self.grid.super_block)
        columns = slice(groups.start * self.size, groups.stop * self.size)
        old = self.params[rows, groups]
        steps = self.number[rows, columns].unflatten(1, (-1, self.size)) / old.scale
        directions = torch.cat([steps, torch.ones_like(steps)] if self.zero_moves else [steps], 1)
        length = self._best_lengths(directions, self.slope[rows, columns], self.h[columns, columns])
        scale, zero = old.scale + length[:, : steps.shape[1], None], old.zero
        if self.zero_moves:  # scales of such grids are positive
            scale = torch.maximum(scale, old.scale / 8)
            zero = old.zero - length[:, steps.shape[1] :, None] / scale
        new = self.grid.round_within(scale, zero, self.params[rows], first)
        codes = self.code[rows, columns].unflatten(1, (-1, self.size))
        move = self.grid.decode(codes, new).flatten(1) - self.number[rows, columns]
        pull = move @ self.h[columns]
        better = (move * (2 * self.slope[rows, columns] - pull[:, columns])).sum(1, keepdim=True) > 0
        self.params.scale[rows, groups] = torch.where(better[..., None], new.scale, old.scale)
        self.params.zero[rows, groups] = torch.where(better[..., None], new.zero, old.zero)
        self.number[rows, columns] += torch.where(better, move, 0.0)
        self.slope[rows] -= torch.where(better, pull, 0.0)

    def _best_lengths(self, directions: Tensor, slope: Tensor, h: Tensor) -> Tensor:
        """How far to go along each direction, all at once, shape (rows, directions).

        Directions have shape (rows, directions, group size). Each changes one group; they go through the groups of the
        super-block in order, once or twice. `slope` is that of the groups, `h` their part of the second moments.
        """
        together = h.shape[0] // self.size
        group = torch.arange(directions.shape[1]) % together
        blocks = h.view(together, self.size, together, self.size)
        pulls = torch.einsum("rkn,knjm->rkjm", directions, blocks[group])
        system = torch.einsum("rkjm,rjm->rkj", pulls[:, :, group], directions)
        wanted = (directions * slope.unflatten(1, (-1, self.size))[:, group]).sum(-1)
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True).clamp_min(1e-30)
        return torch.linalg.solve(system, wanted)

    def _numbers(self, group: int) -> Tensor:
        return self.number[:, group * self.size : (group + 1) * self.size]

    def _h(self, group: int) -> Tensor:
        columns = slice(group * self.size, (group + 1) * self.size)
        return self.h[columns, columns]

    def _best_step(self, group: int, direction: Tensor) -> Tensor:
        """The length, shape (rows, 1), of the best step along a direction, shape (rows, group size)."""
        slope = self.slope[:, group * self.size : (group + 1) * self.size]
        curvature = ((direction @ self._h(group)) * direction).sum(1, keepdim=True)
        return torch.where(curvature > 0, (direction * slope).sum(1, keepdim=True) / curvature.clamp_min(1e-30), 0.0)

    def _best_line(self, group: int) -> tuple[Tensor, Tensor]:
        """The changes, both (rows, 1), of scale and zero point to the pair that is best for the codes of a group: the
        solution of two linear equations a row. No change where all codes are equal, or if the scale were not positive.
        """
        scale = self.params.scale[:, group]
        slope = self.slope[:, group * self.size : (group + 1) * self.size]
        steps, h = self._numbers(group) / scale, self._h(group)
        along = steps @ h
        a, b = (along * steps).sum(1, keepdim=True), along.sum(1, keepdim=True)
        c, x, y = h.sum(), (slope * steps).sum(1, keepdim=True), slope.sum(1, keepdim=True)
        determinant = a * c - b * b
        more, offset = (c * x - b * y) / determinant, (a * y - b * x) / determinant
        usable = (determinant > 1e-6 * a * c) & (scale + more > 0)
        more, offset = (torch.where(usable, change, 0.0) for change in (more, offset))
        return more, -offset / (scale + more)

    def _change(self, group: int, more_scale: Tensor, more_zero: Tensor) -> None:
        """Changes scale and zero point of a group by these amounts, rounded to storable values, where that helps."""
        old, start = self.params[:, group], group * self.size
        new = self.grid.round_params(old.scale + more_scale, old.zero + more_zero)
        move = self.grid.decode(self.code[:, start : start + self.size], new) - self._numbers(group)
        columns = slice(start, start + self.size)
        pull = move @ self.h[columns]
        better = (move * (2 * self.slope[:, columns] - pull[:, columns])).sum(1, keepdim=True) > 0
        self.params.scale[:, group] = torch.where(better, new.scale, old.scale)
        self.params.zero[:, group] = torch.where(better, new.zero, old.zero)
        self.number[:, columns] += torch.where(better, move, 0.0)
        self.slope -= torch.where(better, pull, 0.0)
