"""A rounded matrix as a function of its rounding, with its gradients. Each of its values can be stored.

A tuning step reads every weight a few times, so the speed of memory counts here. Matrices are computed in pieces that
stay in the processor's cache, and gradients are written out instead of recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gyroquant.grids import Basis, GroupParams, QuantizedWeight, straight_through

_EDGE = (
    0.49  # of a step: the largest distance of a weight from its code at the start, so that the code stays the nearest
)
_STRETCH = (0.5, 1.5)
_PIECE = 1 << 16  # numbers of a piece


class TunableWeight:
    """A weight whose codes and scales depend on two tuned tensors, `offset` and `stretch`.

    - `offset`: with u the weight in steps of its group, the code is that of ``u + offset``. So half a step decides
      between two neighbours. A step of a floating-point grid is the one at u. At the start, u is the number closest to
      the weight for which the solver's code is still the nearest one.
    - `stretch`, shape (rows, groups, 2): factors on both ends of the range of a group's codes.

    Scales and zero points are always rounded to storable values. Gradients pass through rounding unchanged. Outside the
    range, a weight pulls only at the end of the range. Its offset still moves while the weight is within half a step of
    the range: otherwise such a weight could never leave the last code.
    """

    def __init__(self, weight: Tensor, rounded: QuantizedWeight):
        self.start, self.grid = rounded, rounded.grid
        matrix = weight if rounded.basis is None else rounded.basis.encode(weight)
        self._shape = (matrix.shape[0], rounded.params.scale.shape[1], -1)
        codes = rounded.codes.view(self._shape)
        decoded = self.grid.decode(codes, rounded.params) / rounded.params.scale
        gap = self.grid.group_step_below(decoded, rounded.params)
        distance = (matrix.view(self._shape) / rounded.params.scale - decoded) / gap
        self.wanted = (decoded + gap * distance.clamp(-_EDGE, _EDGE)) * rounded.params.scale
        self._gap = None if bool((gap == 1).all()) else gap  # even grids: nothing to multiply by
        self._sign = None if bool((rounded.params.scale > 0).all()) else rounded.params.scale.sign()
        self.offset = torch.zeros_like(self.wanted)
        self.stretch = torch.ones(*rounded.params.scale.shape[:2], 2, device=weight.device)

    @property
    def moving(self) -> tuple[Tensor, ...]:
        """What tuning changes."""
        return self.offset, self.stretch

    def _params(self, stretch: Tensor) -> tuple[GroupParams, GroupParams]:
        """The parameters with gradients to `stretch`, and the ones that are stored. Both have the same values."""
        scale, zero = self.grid.rescale(self.start.params, stretch[..., :1], stretch[..., 1:])
        kept = self.grid.round_params(scale.detach(), zero.detach())
        return GroupParams(straight_through(scale, kept.scale), straight_through(zero, kept.zero)), kept

    def _rows(self) -> Iterator[slice]:
        step = max(1, _PIECE // max(1, self.wanted[0].numel()))
        return (slice(start, start + step) for start in range(0, len(self.wanted), step))

    def _values(self, rows: slice, scale: Tensor) -> Tensor:
        """The numbers of some rows before they are rounded to the grid."""
        offset = self.offset[rows]
        return torch.addcmul(self.wanted[rows], offset if self._gap is None else offset * self._gap[rows], scale[rows])

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The rounded matrix, shape (out, in)."""
        numbers, (_, kept) = torch.empty_like(self.wanted), self._params(self.stretch)
        for rows in self._rows():
            numbers[rows] = self.grid.nearest(self._values(rows, kept.scale), kept[rows])
        numbers = numbers.view(len(numbers), -1)
        return numbers if self.start.basis is None else self.start.basis.decode(numbers)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The current codes and scales."""
        _, kept = self._params(self.stretch)
        codes = torch.empty_like(self.start.codes).view(self.wanted.shape)
        for rows in self._rows():
            codes[rows] = self.grid.encode(self._values(rows, kept.scale), kept[rows])
        return replace(self.start, codes=codes.view(self.start.codes.shape), params=kept)

    @torch.no_grad()
    def descend(self, gradient: Tensor, offset_step: float, stretch_step: float) -> None:
        """Moves both tensors by these steps against the signs of their gradients, and clamps them to their ranges.

        `gradient` is that of the loss to `matrix()`, shape (out, in). A step of 0 leaves a tensor as it is.
        """
        stretch = self.stretch.clone().requires_grad_()
        with torch.enable_grad():
            params, kept = self._params(stretch)
            ends = self.grid.range(params.zero)
        size, of_scale = kept.scale.abs(), torch.empty_like(kept.scale)
        of_ends = [torch.empty_like(size), torch.empty_like(size)]
        bounds = [end.detach() * size for end in ends]
        half = [self.grid.group_step_below(end.detach(), kept) * size / 2 for end in ends]
        low, high = bounds[0] - half[0], bounds[1] + half[1]
        gradient = in_basis(gradient, self.start.basis, self.wanted).reshape(self.wanted.shape)
        for rows in self._rows():
            values, pull = self._values(rows, kept.scale), gradient[rows]
            signed = values if self._sign is None else values * self._sign[rows]
            if stretch_step:
                beyond = (signed < bounds[0][rows], signed > bounds[1][rows])
                inside = pull.masked_fill(beyond[0] | beyond[1], 0)
                whole = (pull * self.grid.nearest(values, kept[rows])).sum(-1, keepdim=True)
                of_scale[rows] = (whole - (inside * self.wanted[rows]).sum(-1, keepdim=True)) / kept.scale[rows]
                for total, side in zip(of_ends, beyond, strict=True):
                    total[rows] = (pull * side).sum(-1, keepdim=True) * kept.scale[rows]
            if offset_step:
                inside = pull.masked_fill((signed < low[rows]) | (signed > high[rows]), 0).sign_()
                self.offset[rows] += inside.mul_(
                    -offset_step if self._sign is None else self._sign[rows] * -offset_step
                )
        self.offset.clamp_(-0.5, 0.5)
        if stretch_step:
            slopes = [
                (params.scale, of_scale),
                *(pair for pair in zip(ends, of_ends, strict=True) if pair[0].requires_grad),
            ]
            (slope,) = torch.autograd.grad([end for end, _ in slopes], stretch, [pull for _, pull in slopes])
            self.stretch.sub_(slope.sign_(), alpha=stretch_step).clamp_(*_STRETCH)


def in_basis(gradient: Tensor, basis: Basis | None, numbers: Tensor) -> Tensor:
    """The gradient to numbers in a basis, fp32, for that to the matrix that they decode to. Both have the shape
    (out, in); `numbers` is of any shape with as many rows.
    """
    gradient = gradient.float()
    if basis is None:
        return gradient
    with torch.enable_grad():
        leaf = torch.zeros_like(numbers).view(len(numbers), -1).requires_grad_()
        return torch.autograd.grad(basis.decode(leaf), leaf, gradient)[0]
