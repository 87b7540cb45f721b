"""A rounded matrix as a differentiable function of its rounding. Each of its values can be stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gyroquant.grids import GroupParams, QuantizedWeight, straight_through

_EDGE = (
    0.49  # of a step: the largest distance of a weight from its code at the start, so that the code stays the nearest
)
_STRETCH = (0.5, 1.5)


class TunableWeight:
    """A weight whose codes and scales depend on two tuned tensors, `offset` and `stretch`.

    - `offset`: with u the weight in steps of its group, the code is that of ``u + offset``. So half a step decides
      between two neighbours. A step of a floating-point grid is the one at u. At the start, u is the number closest to
      the weight for which the solver's code is still the nearest one.
    - `stretch`, shape (rows, groups, 2): factors on both ends of the range of a group's codes.

    Scales and zero points are always rounded to storable values. Gradients pass through rounding unchanged, and are
    zero outside the range.
    """

    def __init__(self, weight: Tensor, rounded: QuantizedWeight):
        self.start, self.grid = rounded, rounded.grid
        matrix = weight if rounded.basis is None else rounded.basis.encode(weight)
        self._shape = (matrix.shape[0], rounded.params.scale.shape[1], -1)
        codes = rounded.codes.view(self._shape)
        decoded = self.grid.decode(codes, rounded.params) / rounded.params.scale
        self._gap = self.grid.step_below(decoded)
        distance = (matrix.view(self._shape) / rounded.params.scale - decoded) / self._gap
        self.wanted = (decoded + self._gap * distance.clamp(-_EDGE, _EDGE)) * rounded.params.scale
        self.offset = torch.zeros_like(self.wanted)
        self.stretch = torch.ones(*rounded.params.scale.shape[:2], 2, device=weight.device)

    def _params(self) -> tuple[GroupParams, GroupParams]:
        """The parameters with gradients, and the ones that are stored. Both have the same values."""
        scale, zero = self.grid.rescale(self.start.params, self.stretch[..., :1], self.stretch[..., 1:])
        kept = self.grid.round_params(scale.detach(), zero.detach())
        return GroupParams(straight_through(scale, kept.scale), straight_through(zero, kept.zero)), kept

    def _steps(self, scale: Tensor) -> Tensor:
        return self.wanted / scale + self._gap * self.offset

    def matrix(self) -> Tensor:
        """The rounded matrix, shape (out, in), with gradients to `offset` and `stretch`."""
        params, kept = self._params()
        first, last = self.grid.range(params.zero)
        steps = torch.minimum(torch.maximum(self._steps(params.scale), first), last)
        nearest = self.grid.nearest(steps.detach() * kept.scale, kept) / kept.scale
        numbers = (params.scale * straight_through(steps, nearest)).view(len(self.wanted), -1)
        return numbers if self.start.basis is None else self.start.basis.decode(numbers)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The current codes and scales."""
        _, kept = self._params()
        codes = self.grid.encode(self._steps(kept.scale) * kept.scale, kept)
        return replace(self.start, codes=codes.view(self.start.codes.shape), params=kept)

    def clamp(self) -> None:
        """Clamps the tuned tensors to their ranges."""
        with torch.no_grad():
            self.offset.clamp_(-0.5, 0.5)
            self.stretch.clamp_(*_STRETCH)
