"""Grids whose groups choose between floating-point and integer elements of four bits (IF4, arXiv 2603.28765)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, stored
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.floating import E2M1_MAX, SCALINGS, E2M1Grid
from gyroquant.grids.microscaling import PowerOfTwoGrid, TensorScaleGrid

_MOST = 7  # steps of the largest integer
_STEP = E2M1_MAX / _MOST  # between integer elements, so that the largest element is 6 in both kinds
# By code, in two's complement. The original's decoder reads code 8 as -8 steps, but neither its encoder nor ours writes
# it. Here it is zero, as code 8 of E2M1 is, so that the range is the same on both sides.
_INTEGERS = torch.tensor([*range(8), 0, *range(-_MOST, 0)], dtype=torch.float32) * E2M1_MAX / _MOST


class IntFloatGrid(E2M1Grid):
    """Base class of grids whose groups have E2M1 elements or the integers -7 to 7, times 6/7.

    The largest element is 6 in both kinds. In `GroupParams`, a group of integers has a negative scale, and its numbers
    are the magnitude of the scale times an element. Evenly spaced numbers suit groups without outliers, E2M1 those
    with.
    """

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        size = params.scale.abs()
        whole = self._whole(weights, size).to(torch.int8).view(torch.uint8) & 15
        return torch.where(params.scale < 0, whole, super().encode(weights, GroupParams(size, params.zero)))

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        size = params.scale.abs()
        whole = _INTEGERS.to(codes.device)[codes.int()] * size
        return torch.where(params.scale < 0, whole, super().decode(codes, GroupParams(size, params.zero)))

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        size = params.scale.abs()
        whole = self._whole(weights, size).mul_(E2M1_MAX).div_(_MOST).mul_(size)
        return torch.where(params.scale < 0, whole, super().nearest(weights, GroupParams(size, params.zero)))

    def _whole(self, weights: Tensor, size: Tensor) -> Tensor:
        """The nearest integers, -7 to 7. Ties go to the even one."""
        return (weights / size).div_(_STEP).round_().clamp_(-_MOST, _MOST).add_(0.0)  # adding 0 makes -0 to 0

    def group_step_below(self, numbers: Tensor, params: GroupParams) -> Tensor:
        return torch.where(params.scale < 0, _STEP, self.step_below(numbers))


def _both_kinds(params: GroupParams) -> list[GroupParams]:
    """A scale for E2M1 elements and for integers, in this order: of equals, E2M1 is taken."""
    return [params, GroupParams(-params.scale, params.zero)]


class If4Grid(TensorScaleGrid, IntFloatGrid):
    """IF4: as NVFP4, but each group has E2M1 elements or integers, whichever have the smaller squared error.

    The choice is the sign bit of the E4M3 scale, which NVFP4 does not use, so it takes no bits: 1 means integers
    (arXiv 2603.28765; github.com/mit-han-lab/fouroversix, whose bytes these are but for the order of the scales).

    `scale`: `minmax`, as in the original: the largest weight becomes 6, and both kinds have this scale. `mse`: the
    choice is among both kinds at each of the 51 scales of nvfp4.
    """

    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    grid: Literal["if4"] = "if4"
    scale: Literal["minmax", "mse"] = "mse"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(scale="minmax")]

    @property
    def _large_elements(self) -> tuple[float, ...]:
        return (E2M1_MAX, 4.0, *(steps * E2M1_MAX / _MOST for steps in (6, 5, 4)))

    def _candidates(self, wide: Tensor, tensor_scale: Tensor) -> list[GroupParams]:
        factors = (1.0,) if self.scale == "minmax" else SCALINGS
        return [kind for factor in factors for kind in _both_kinds(self._params(wide * factor, tensor_scale))]

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        near = super().round_params(scale.abs(), zero)
        return GroupParams(torch.where(scale < 0, -near.scale, near.scale), near.zero)


class MxIf4Grid(PowerOfTwoGrid, IntFloatGrid):
    """MXFP4 whose groups have E2M1 elements or integers, whichever have the smaller squared error.

    The transfer of IF4 to power-of-two scales, which have no sign bit: the choice is one more bit for each group. No
    paper that we know of has it.

    `scale_rounding`: as for mxfp4. Both kinds are tried at each power of two.
    """

    grid: Literal["mxif4"] = "mxif4"
    scale_rounding: Literal["floor", "round", "ceil", "mse", "four_over_six"] = "mse"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(scale_rounding="floor"), cls(scale_rounding="four_over_six")]

    @property
    def group_bits(self) -> int:
        return 9

    def fit(self, groups: Tensor) -> GroupParams:
        powers = self._powers(groups, self.scale_rounding)
        return self.least_squares(groups, (kind for power in powers for kind in _both_kinds(power)))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        near = super().round_params(scale.abs(), zero)
        return GroupParams(torch.where(scale < 0, -near.scale, near.scale), near.zero)

    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        return super()._stored(scale.abs()) | {"choices": pack((scale < 0).to(torch.uint8), 1)}

    def _restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        size = super()._restored(arrays, shape)
        bits = stored(arrays, "choices", ((shape[0] * shape[1] + 7) // 8,))
        return torch.where(unpack(bits, 1, shape) > 0, -size, size)


__all__ = ["If4Grid", "IntFloatGrid", "MxIf4Grid"]
