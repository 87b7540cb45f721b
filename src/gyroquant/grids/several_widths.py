"""Integer grids whose groups have one of several numbers of bits."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, GroupSize
from gyroquant.grids.half_scale import HalfScaleGrid
from gyroquant.grids.integer import IntegerGrid

APART = 1024
"""What lies between the zero points of two widths. The zero point of a code is at most 255."""

Width = Annotated[int, Field(ge=1, le=8)]


class SeveralWidthsGrid(HalfScaleGrid):
    """Base class of grids whose groups have the numbers of integer grids (`kinds`) that differ in their bits only.

    In `GroupParams`, the zero point holds the width: 1024 times its place among `widths` is added to it.
    """

    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    group_size: GroupSize = 128
    symmetric: bool = False
    midrise: bool = False
    scale: Literal["minmax", "mse"] = "mse"
    clip: Annotated[float, Field(gt=0, le=1)] = 1.0

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """The numbers of bits that a group may have, the fewest first."""

    @property
    def kinds(self) -> tuple[IntegerGrid, ...]:
        """The integer grid of each of `widths`, with the tensor scale of this grid."""
        settings = {name: getattr(self, name) for name in ("group_size", "symmetric", "midrise", "scale", "clip")}
        grids = (IntegerGrid(**settings, bits=width) for width in self.widths)
        scale = self._tensor_scale
        return tuple(grid if scale is None else grid._with(scale) for grid in grids)

    @property
    def code_count(self) -> int:
        return int(2 ** self.widths[-1])

    @property
    def holds_zero(self) -> bool:
        return all(kind.holds_zero for kind in self.kinds)

    def _place(self, zero: Tensor) -> Tensor:
        return ((zero.detach() + APART // 2) / APART).floor().clamp(0, len(self.widths) - 1).long()

    def _split(self, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The zero points themselves, their offsets, and the largest code of each group. All have one shape."""
        place = self._place(zero)
        largest = torch.tensor([2.0**width - 1 for width in self.widths], device=zero.device)[place]
        return zero - APART * place, APART * place, largest

    def with_tensor_scale(self, *weights: Tensor) -> Self:
        """A group of few bits has the largest scale, so the largest tensor scale of any width holds all of them."""
        if self._tensor_scale is not None:
            return self
        scales = [kind.with_tensor_scale(*weights).tensor_scale for kind in self.kinds]
        needed = [scale for scale in scales if scale is not None]
        return self._with(max(needed)) if needed else self

    def _full_scale(self, groups: Tensor) -> Tensor:
        return self.kinds[0]._full_scale(groups)

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        own, offset, largest = self._split(zero)
        if self.symmetric:
            middles = torch.tensor([kind._middle for kind in self.kinds], device=zero.device)[self._place(zero)]
            return GroupParams(self._clamped(scale, -torch.inf), middles + offset)
        return GroupParams(self._clamped(scale, 0), torch.minimum(torch.round(own).clamp(min=0), largest) + offset)

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            return super().rescale(params, low, high)
        own, offset, largest = self._split(params.zero)
        steps = (own * low + (largest - own) * high) / largest  # the length of a new step in old steps
        return params.scale * steps, own * low / steps + offset

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        own, _, largest = self._split(zero)
        return -own, largest - own

    def _steps(self, weights: Tensor, params: GroupParams) -> tuple[Tensor, Tensor]:
        own, _, largest = self._split(params.zero)
        return torch.minimum((weights / params.scale).add_(own).round_().clamp_(min=0), largest), own

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._steps(weights, params)[0].to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return (codes.float() - self._split(params.zero)[0]) * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        steps, own = self._steps(weights, params)
        return steps.sub_(own).mul_(params.scale)


__all__ = ["APART", "SeveralWidthsGrid", "Width"]
