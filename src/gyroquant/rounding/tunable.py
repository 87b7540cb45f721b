"""A rounded matrix as a differentiable function of how it is rounded, which always is something that can be stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gyroquant.grids import GroupParams, QuantizedWeight, straight_through

_EDGE = 0.49  # of a step: how far from its code an offset may start, so that the code is the one that was there
_STRETCH = (0.5, 1.5)


class TunableWeight:
    """A weight whose codes and scales come from `offset` and `stretch`, the tensors that are tuned.

    With u the weight in steps of its group, the code is that of ``u + offset``: half a step decides between two
    neighbours (the steps of a floating-point grid are as long as they are where u lies). u starts where the code that
    is there is the nearest one, and as close to the weight as that allows. `stretch`, shape (rows, groups, 2), moves
    both ends of what a group's codes span. Scales and zero points are rounded to what can be stored all along;
    gradients pass rounding as if it were not there, and stop at the ends of the span.
    """

    def __init__(self, weight: Tensor, rounded: QuantizedWeight):
        self.start, self.grid = rounded, rounded.grid
        matrix = weight if rounded.basis is None else rounded.basis.encode(weight)
        self._shape = (matrix.shape[0], rounded.params.scale.shape[1], -1)
        codes = rounded.codes.view(self._shape)
        there = self.grid.decode(codes, rounded.params) / rounded.params.scale
        self._gap = self.grid.gap(there)
        away = (matrix.view(self._shape) / rounded.params.scale - there) / self._gap
        self.wanted = (there + self._gap * away.clamp(-_EDGE, _EDGE)) * rounded.params.scale
        self.offset = torch.zeros_like(self.wanted)
        self.stretch = torch.ones(*rounded.params.scale.shape[:2], 2, device=weight.device)

    def _params(self) -> tuple[GroupParams, GroupParams]:
        """The parameters that gradients see, and the ones that are stored, which are the same numbers."""
        scale, zero = self.grid.stretched(self.start.params, self.stretch[..., :1], self.stretch[..., 1:])
        kept = self.grid.storable(scale.detach(), zero.detach())
        return GroupParams(straight_through(scale, kept.scale), straight_through(zero, kept.zero)), kept

    def _steps(self, scale: Tensor) -> Tensor:
        return self.wanted / scale + self._gap * self.offset

    def matrix(self) -> Tensor:
        """The rounded matrix, shape (out, in), with gradients to `offset` and `stretch`."""
        params, kept = self._params()
        first, last = self.grid.span(params.zero)
        steps = torch.minimum(torch.maximum(self._steps(params.scale), first), last)
        nearest = self.grid.nearest(steps.detach() * kept.scale, kept) / kept.scale
        numbers = (params.scale * straight_through(steps, nearest)).view(len(self.wanted), -1)
        return numbers if self.start.basis is None else self.start.basis.decode(numbers)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Codes and scales as they are now."""
        _, kept = self._params()
        codes = self.grid.encode(self._steps(kept.scale) * kept.scale, kept)
        return replace(self.start, codes=codes.view(self.start.codes.shape), params=kept)

    def limit(self) -> None:
        """Brings the tuned tensors back to where they may be."""
        with torch.no_grad():
            self.offset.clamp_(-0.5, 0.5)
            self.stretch.clamp_(*_STRETCH)
