"""Grids of evenly spaced numbers: ``(code - zero) * scale``, with one scale and one zero point for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.grids.base import GroupParams
from gyroquant.grids.half_scale import HalfScaleGrid


class EvenGrid(HalfScaleGrid):
    """Grids whose codes 0 .. 2^bits - 1 stand for ``(code - zero) * scale``.

    Subclasses say which zero points they store: `IntegerGrid` those that are codes or lie half-way between two,
    `FloatZeroGrid` any number, `RealZeroGrid` 256 numbers from the first code to the last.
    """

    @property
    def _levels(self) -> int:
        return int(2**self.bits - 1)

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        return -zero, self._levels - zero

    def _steps(self, weights: Tensor, params: GroupParams) -> Tensor:
        return (weights / params.scale).add_(params.zero).round_().clamp_(0, self._levels)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._steps(weights, params).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return (codes.float() - params.zero) * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._steps(weights, params).sub_(params.zero).mul_(params.scale)
