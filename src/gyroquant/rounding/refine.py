"""Making a rounded matrix better without making it larger: codes, scales and zero points by coordinate descent.

The objective is what a layer gets wrong on its calibration tokens, ``|X W^T - Y Q^T|^2`` with X the inputs of the
unrounded model and Y those that the layer will see (both the same where they are not known apart), plus the damping
``lambda |W - Q|^2``. It is quadratic in every number that is stored, so each can be set to its best value while all
others are held: a column of codes (as in QuantEase, arXiv 2309.01885), then the scale of a group, then its zero point.
No step can make the objective worse, and none is taken that does not make it better.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gyroquant.grids import GroupParams, QuantizedWeight
from gyroquant.rounding.base import InputStatistics

_BLOCK = 64


class Refine(BaseModel):
    """How often codes are gone through, and whether `scales` (and zero points) are fitted anew each time.

    `damp_percent` is that of GPTQ: of the mean second moment, added to each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    passes: Annotated[int, Field(gt=0, le=100)] = 4
    scales: bool = True
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01

    def run(self, weight: Tensor, rounded: QuantizedWeight, statistics: InputStatistics) -> QuantizedWeight:
        """Refines what a solver made of `weight`, shape (out, in), fp32, both in the basis of the codes."""
        descent = _Descent(weight, rounded, statistics, self.damp_percent)
        for _ in range(self.passes):
            if self.scales:
                descent.scales()
            if not descent.codes():
                break
        return replace(rounded, codes=descent.code, params=descent.params)


class _Descent:
    """The state: codes, parameters, the numbers that they stand for, and minus half the slope of the objective."""

    def __init__(self, weight: Tensor, rounded: QuantizedWeight, statistics: InputStatistics, damp_percent: float):
        columns = weight.shape[1]
        self.grid, self.size = rounded.grid, rounded.grid.group_of(columns)
        self.code = rounded.codes.clone()
        self.params = GroupParams(rounded.params.scale.clone(), rounded.params.zero.clone())
        damp = damp_percent * statistics.gram.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(columns, device=weight.device)
        scale = max(statistics.count, 1)  # so that fp32 holds every product whatever the number of tokens
        self.h = ((statistics.gram + damp * eye) / scale).to(weight)  # in a basis, moments are fp64
        wanted = ((statistics.cross + damp * eye) / scale).to(weight)
        self.number = replace(rounded, basis=None).dequantize()
        self.slope = weight @ wanted - self.number @ self.h

    def _moved(self, start: int, stop: int, change: Tensor) -> None:
        """Takes note that columns start..stop changed."""
        self.number[:, start:stop] += change
        self.slope -= change @ self.h[start:stop]

    def codes(self) -> int:
        """Sets every column of codes to its best, one after the other; returns how many codes changed."""
        changed = 0
        for group in range(self.params.scale.shape[1]):
            params = self.params[:, group]
            first = group * self.size
            for start in range(first, first + self.size, _BLOCK):
                changed += self._codes_of(start, min(start + _BLOCK, first + self.size), params)
        return changed

    def _codes_of(self, start: int, stop: int, params: GroupParams) -> int:
        slope, h = self.slope[:, start:stop].T.contiguous(), self.h[start:stop, start:stop]
        number = self.number[:, start:stop].T.contiguous()
        code = self.code[:, start:stop].T.contiguous()
        before, changed = number.clone(), 0
        for i in range(stop - start):
            wanted = number[i] + slope[i] / h[i, i]
            new = self.grid.encode(wanted[:, None], params)
            value = self.grid.decode(new, params)[:, 0]
            move = value - number[i]
            better = move * (2 * slope[i] - move * h[i, i]) > 0
            move = torch.where(better, move, 0.0)
            code[i] = torch.where(better, new[:, 0], code[i])
            number[i] += move
            slope.addr_(h[i], move, alpha=-1)
            changed += int(better.sum())
        self.code[:, start:stop] = code.T
        self._moved(start, stop, (number - before).T)
        return changed

    def scales(self) -> None:
        """Sets the scale of every group to its best, then its zero point, as far as the grid can store them."""
        for group in range(self.params.scale.shape[1]):
            scale, zero = self.params.scale[:, group], self.params.zero[:, group]
            self._try(group, self._along(group, self._numbers(group) / scale), torch.zeros_like(zero))
            scale = self.params.scale[:, group]
            self._try(group, torch.zeros_like(scale), self._along(group, -scale.expand(-1, self.size)))

    def _numbers(self, group: int) -> Tensor:
        return self.number[:, group * self.size : (group + 1) * self.size]

    def _h(self, group: int) -> Tensor:
        columns = slice(group * self.size, (group + 1) * self.size)
        return self.h[columns, columns]

    def _along(self, group: int, direction: Tensor) -> Tensor:
        """How far to go along a direction, shape (rows, group size), for the least error; shape (rows, 1)."""
        slope = self.slope[:, group * self.size : (group + 1) * self.size]
        bend = ((direction @ self._h(group)) * direction).sum(1, keepdim=True)
        return torch.where(bend > 0, (direction * slope).sum(1, keepdim=True) / bend.clamp_min(1e-30), 0.0)

    def _try(self, group: int, more_scale: Tensor, more_zero: Tensor) -> None:
        """Changes scale and zero point of a group by this much, as near as can be stored, in rows where that helps."""
        old, start = self.params[:, group], group * self.size
        new = self.grid.storable(old.scale + more_scale, old.zero + more_zero)
        move = self.grid.decode(self.code[:, start : start + self.size], new) - self._numbers(group)
        slope = self.slope[:, start : start + self.size]
        better = (move * (2 * slope - move @ self._h(group))).sum(1, keepdim=True) > 0
        self.params.scale[:, group] = torch.where(better, new.scale, old.scale)
        self.params.zero[:, group] = torch.where(better, new.zero, old.zero)
        self._moved(start, start + self.size, torch.where(better, move, 0.0))
