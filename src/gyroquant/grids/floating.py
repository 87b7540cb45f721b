"""Floating-point grids: elements of 4 or 8 bits with an fp16 scale for each group, and no zero point."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams, GroupSize
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.exact import prefer_exact
from gyroquant.grids.half_scale import HalfScaleGrid

E2M1_MAX = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float32)  # by code
_EXPONENT = 0x7F800000  # the exponent bits of fp32
# Factors that the search for the least squared error tries. Some are above 1: the steps of E2M1 are uneven, and many
# groups fit better if their largest weight becomes 4 and not 6 ("Four Over Six").
SCALINGS = tuple(1.0 - 0.02 * i for i in range(-25, 26))


def nearest_e2m1(weights: Tensor, scale: Tensor) -> Tensor:
    """The number nearest to each of ``weights / scale`` among 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, fp32.

    Ties go to the even mantissa. Exact for every fp32 quotient: one step is half the number's power of two, at least
    half of 1. Adding and subtracting 1.5 * 2^23 steps leaves a multiple of a step, rounded as the addition rounds. Zero
    is never negative.
    """
    x = (weights / scale).clamp_(-E2M1_MAX, E2M1_MAX)
    steps = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1).mul_(1.5 * 2**22)
    return x.add_(steps).sub_(steps)


def largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, shape (..., 1). Raises InputError if one is NaN or infinite."""
    magnitude = torch.maximum(groups.amax(-1, keepdim=True), -groups.amin(-1, keepdim=True))
    if not bool(magnitude.isfinite().all()):
        raise InputError("a group of numbers is not finite (NaN or infinite)")
    return magnitude


class FloatGrid(Grid):
    """Base class of floating-point grids: numbers are `scale` times an element. `zero` is always 0."""

    @property
    @abstractmethod
    def _max(self) -> float:
        """The largest element."""

    @property
    @abstractmethod
    def _mantissa(self) -> int:
        """The number of mantissa bits after the leading one of an element."""

    @property
    @abstractmethod
    def _least_exponent(self) -> int:
        """One plus the exponent of the smallest power of two from which elements have a leading one."""

    def scaled(self, scale: Tensor) -> GroupParams:
        """GroupParams with these scales and zero points of 0."""
        return GroupParams(scale, torch.zeros_like(scale))

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.full_like(zero, self._max)
        return -largest, largest

    def step_below(self, numbers: Tensor) -> Tensor:
        _, exponent = torch.frexp(numbers.abs() * (1 - 2.0**-12))  # a power of two counts to the binade below it
        return torch.ldexp(torch.ones_like(numbers), exponent.clamp_min(self._least_exponent) - 1 - self._mantissa)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        return {"codes": pack(codes, self.bits)} | self._stored(params.scale.squeeze(-1))

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        scale = self._restored(arrays, (rows, columns // self.group_of(columns)))
        return unpack(arrays["codes"], self.bits, shape), self.scaled(scale.unsqueeze(-1))

    @abstractmethod
    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        """The arrays stored for scales of shape (rows, groups)."""

    @abstractmethod
    def _restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The inverse of `_stored`."""


class HalfScaleFloatGrid(FloatGrid, HalfScaleGrid):
    """Floating-point grids with an fp16 scale for each group."""

    @property
    def group_bits(self) -> int:
        return 16

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        return self.scaled(self._clamped(scale, 0))

    @property
    def _may_move(self) -> tuple[float, float]:
        share = 2.0 ** -(self._mantissa + 2)  # less than half a step of the largest numbers, which are the coarsest
        return share, share

    def _full_scale(self, groups: Tensor) -> Tensor:
        return groups.abs().amax(-1, keepdim=True) / self._max

    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        return self._half_arrays(scale)

    def _restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return self._half_restored(arrays, shape)


class E2M1Grid(FloatGrid):
    """Elements with a sign, two exponent bits and one mantissa bit, as in the OCP Microscaling specification."""

    bits: Literal[4] = 4

    @property
    def _max(self) -> float:
        return E2M1_MAX

    @property
    def _mantissa(self) -> int:
        return 1

    @property
    def _least_exponent(self) -> int:
        return 1

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        element = nearest_e2m1(weights, params.scale)
        size = element.abs()
        # The code of a magnitude rises by 2, 1 and 1/2 a unit up to 2, 4 and 6, so it is the lowest of three lines.
        code = torch.minimum(torch.minimum(2 * size, size + 2), size / 2 + 4)
        return (code + 8 * (element < 0)).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return _E2M1.to(codes.device)[codes.int()] * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        return nearest_e2m1(weights, params.scale).mul_(params.scale)


class Fp4Grid(E2M1Grid, HalfScaleFloatGrid):
    """E2M1 elements with an fp16 scale for each group or row.

    `scale` states how scales are fitted. `minmax`: the largest weight of a group becomes 6. `mse`: the scale of least
    squared error, from half to one and a half times the scale of `minmax`.
    """

    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    grid: Literal["fp4"] = "fp4"
    group_size: GroupSize = -1
    scale: Literal["minmax", "mse"] = "mse"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(scale="minmax"), cls(group_size=64)]

    @property
    def _may_move(self) -> tuple[float, float]:
        return 2.0**-7, 2.0**-6

    def _full_scale(self, groups: Tensor) -> Tensor:
        return groups.abs().amax(-1, keepdim=True) / E2M1_MAX * (1 if self.scale == "minmax" else SCALINGS[0])

    def fit(self, groups: Tensor) -> GroupParams:
        wide = largest(groups) / E2M1_MAX
        if self.scale == "minmax":
            return self.scaled(self._half(wide))
        return self.least_squares(groups, (self.scaled(self._half(wide * factor)) for factor in SCALINGS))


_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Fp8Grid(HalfScaleFloatGrid):
    """Elements of 8 bits with an fp16 scale for each group or row. Codes are the bit patterns.

    `format` is e4m3 (the variant without infinity, up to 448) or e5m2 (up to 57344). The largest weight of a group
    becomes the largest element, or another element if the group already lies on the grid.
    """

    grid: Literal["fp8"] = "fp8"
    bits: Literal[8] = 8
    group_size: GroupSize = -1
    format: Literal["e4m3", "e5m2"] = "e4m3"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(group_size=32), cls(format="e5m2")]

    def fit(self, groups: Tensor) -> GroupParams:
        extreme = largest(groups)
        params = self.scaled(self._half(extreme / self._max))
        return prefer_exact(self, groups, params, self.scaled(extreme / self._largest_elements(extreme.device)))

    def _largest_elements(self, device: torch.device) -> Tensor:
        """The elements above half the largest one: one for each mantissa.

        The largest weight of a group that lies on the grid is one of them, in units of some scale.
        """
        elements = torch.arange(128, dtype=torch.uint8, device=device).view(_FP8[self.format]).float()
        return elements[elements.isfinite() & (elements > self._max / 2)]

    @property
    def _max(self) -> float:
        return float(torch.finfo(_FP8[self.format]).max)

    @property
    def _mantissa(self) -> int:
        return 3 if self.format == "e4m3" else 2

    @property
    def _least_exponent(self) -> int:
        return math.frexp(torch.finfo(_FP8[self.format]).tiny)[1]

    def _elements(self, weights: Tensor, params: GroupParams) -> Tensor:
        return (weights / params.scale).clamp_(-self._max, self._max).to(_FP8[self.format])

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._elements(weights, params).view(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return codes.view(_FP8[self.format]).float() * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._elements(weights, params).float().mul_(params.scale)
