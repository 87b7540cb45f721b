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
_EXPONENT = 0x7F800000  # where fp32 keeps it
# Factors that the search for the least squared error tries. They go above 1 too: the steps of E2M1 are uneven, and many
# a group fits better when its largest weight becomes 4 and not 6 ("Four Over Six").
SCALINGS = tuple(1.0 - 0.02 * i for i in range(-25, 26))


def nearest_e2m1(weights: Tensor, scale: Tensor) -> Tensor:
    """The nearest to each of ``weights / scale`` among 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, fp32; ties go to
    the even mantissa.

    Exact for every fp32 quotient: one step is half the number's power of two, at least half of 1, and adding and taking
    off 1.5 * 2^23 steps leaves a multiple of a step, rounded as the addition itself rounds. Zero is never negative.
    """
    x = (weights / scale).clamp_(-E2M1_MAX, E2M1_MAX)
    steps = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1).mul_(1.5 * 2**22)
    return x.add_(steps).sub_(steps)


def largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, shape (..., 1). Raises InputError when one is NaN or infinite."""
    found = torch.maximum(groups.amax(-1, keepdim=True), -groups.amin(-1, keepdim=True))
    if not bool(found.isfinite().all()):
        raise InputError("a group of numbers is not finite (NaN or infinite)")
    return found


class FloatGrid(Grid):
    """What floating-point grids share: `scale` times an element, stored as codes and scales; `zero` is always 0."""

    @property
    @abstractmethod
    def _max(self) -> float:
        """The largest element."""

    @property
    @abstractmethod
    def _mantissa(self) -> int:
        """The bits behind an element's leading one."""

    @property
    @abstractmethod
    def _least_exponent(self) -> int:
        """Of two, from which on elements have a leading one; plus one."""

    def scaled(self, scale: Tensor) -> GroupParams:
        """Parameters of these scales."""
        return GroupParams(scale, torch.zeros_like(scale))

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.full_like(zero, self._max)
        return -largest, largest

    def step_below(self, numbers: Tensor) -> Tensor:
        _, exponent = torch.frexp(numbers.abs() * (1 - 2.0**-12))  # a power of two belongs to what lies below it
        return torch.ldexp(torch.ones_like(numbers), exponent.clamp_min(self._least_exponent) - 1 - self._mantissa)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        return {"codes": pack(codes, self.bits)} | self._stored(params.scale.squeeze(-1))

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        scale = self._restored(arrays, (rows, columns // self.group_of(columns)))
        return unpack(arrays["codes"], self.bits, shape), self.scaled(scale.unsqueeze(-1))

    @abstractmethod
    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        """What is stored for scales of shape (rows, groups)."""

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
    """Elements of sign, two bits of exponent and one of mantissa, as the OCP Microscaling specification has them."""

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
        # Codes of magnitudes rise by 2, 1 and 1/2 a unit up to 2, 4 and 6, so the lowest of three lines is the code.
        code = torch.minimum(torch.minimum(2 * size, size + 2), size / 2 + 4)
        return (code + 8 * (element < 0)).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return _E2M1.to(codes.device)[codes.int()] * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        return nearest_e2m1(weights, params.scale).mul_(params.scale)


class Fp4Grid(E2M1Grid, HalfScaleFloatGrid):
    """E2M1 elements with an fp16 scale for each group or row.

    `scale` chooses between the largest weight of a group becoming 6 (`minmax`) and the scale of least squared error
    from half to one and a half times that (`mse`).
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
    """Elements of 8 bits, `format` e4m3 (the finite one, up to 448) or e5m2 (up to 57344), with an fp16 scale for each
    group or row. Codes are the bit patterns; the largest weight of a group becomes the largest element, or another one
    where a group lies on the grid already.
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
        found = self.scaled(self._half(extreme / self._max))
        return prefer_exact(self, groups, found, self.scaled(extreme / self._largest_elements(extreme.device)))

    def _largest_elements(self, device: torch.device) -> Tensor:
        """The elements above half the largest one, of every mantissa one: what the largest weight of a group that lies
        on the grid is in units of some scale.
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
