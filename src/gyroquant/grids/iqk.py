"""ik_llama.cpp's IQK types: 4, 8 or 16 uneven numbers, in one of two positions for each group.

Layouts and decoders: ``iqk_quantize.cpp`` of ik_llama.cpp, a fork of llama.cpp.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.ik_scales import IkGrid, ScaleType

NUMBERS = {
    2: (-31, -13, 1, 17),
    3: (-63, -40, -23, -10, 1, 13, 28, 47),
    4: (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
"""The numbers of the types of 2, 3 and 4 bits, in units of the scale."""
SHIFT = {2: 5, 3: 4, 4: 4}
"""What is added to all numbers of a group whose bit of choice is set."""

_ODD = tuple(range(-127, 128, 2))  # multiples of IQ4_KS
_SIGNED = (*range(1, 32, 2), *range(-1, -32, -2))  # of IQ3_K: a magnitude, then a sign
_TYPES = {
    kind.name: kind
    for kind in (
        ScaleType("IQ2_K", 16, tuple(range(-8, 8)), -5.0, False, True),
        ScaleType("IQ2_KS", 32, tuple(range(-16, 16)), -5.0, True, True),
        ScaleType("IQ3_K", 16, _SIGNED, -4.0, False, True),
        ScaleType("IQ3_KS", 32, tuple(range(-16, 16)), -4.0, True, True),
        ScaleType("IQ4_K", 16, tuple(range(-32, 32)), -4.0, False, True),
        ScaleType("IQ4_KS", 32, _ODD, -4.0, True, False),
    )
}
# Factors on the scale at which the largest weight is the lowest or the highest number
_WIDTHS = {
    2: (0.55, 0.65, 0.75, 0.85, 0.95, 1.05),
    3: (0.65, 0.75, 0.85, 0.95, 1.05),
    4: (0.75, 0.82, 0.89, 0.96, 1.03),
}


class IqkGrid(IkGrid):
    """The types IQ2_K to IQ4_K and IQ2_KS to IQ4_KS of ik_llama.cpp, exactly as it decodes them.

    - `two_bits`: the type of 2 bits: `IQ2_K` (2.375 true bits) or `IQ2_KS` (2.1875, and 16 bits for each row).
    - `three_bits`: the type of 3 bits: `IQ3_K` (3.4375) or `IQ3_KS` (3.1875, and 16 bits for each row).
    - `four_bits`: the type of 4 bits: `IQ4_K` (4.5) or `IQ4_KS` (4.25, and 32 bits for each row).

    Codes stand for the numbers of a table, which is not symmetric, so scales may be negative. A group may move all
    numbers up by 5 (2 bits) or 4. `GroupParams.zero` is then -5 or -4, otherwise 0. Groups have 16 weights, and
    multiples of the scale of a super-block. In types with KS they have 32 weights, and multiples of the scale of the
    row. `allocate` may also choose 5 and 6 bits, which are Q5_K and Q6_K.
    """

    scale_step: ClassVar[float] = 2.0  # from once to three times the smallest

    grid: Literal["iqk"] = "iqk"
    bits: Literal[2, 3, 4] = 4
    group_size: int = 16
    two_bits: Literal["IQ2_K", "IQ2_KS"] = "IQ2_K"
    three_bits: Literal["IQ3_K", "IQ3_KS"] = "IQ3_K"
    four_bits: Literal["IQ4_K", "IQ4_KS"] = "IQ4_K"

    @model_validator(mode="before")
    @classmethod
    def _group_of_the_type(cls, settings: Any) -> Any:
        """Adds the group size of the type if none is given."""
        if not isinstance(settings, dict):
            return settings
        key, usual = {2: ("two_bits", "IQ2_K"), 3: ("three_bits", "IQ3_K")}.get(
            settings.get("bits", 4), ("four_bits", "IQ4_K")
        )
        name = settings.get(key, usual)
        return {"group_size": _TYPES[name].group} | settings if name in _TYPES else settings

    @classmethod
    def examples(cls) -> list[Self]:
        plain = [cls(bits=bits) for bits in (2, 3, 4)]
        return [*plain, cls(bits=2, two_bits="IQ2_KS"), cls(bits=3, three_bits="IQ3_KS"), cls(four_bits="IQ4_KS")]

    @property
    def _scale_type(self) -> ScaleType:
        return _TYPES[{2: self.two_bits, 3: self.three_bits, 4: self.four_bits}[self.bits]]

    def _free(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        outermost = torch.where(-low > high, low, high)
        best = GroupParams(torch.ones_like(low), torch.zeros_like(low))
        squares, most = torch.ones_like(low), torch.full_like(low, -1.0)
        for choice in (0.0, self._scale_type.choice):
            numbers = _nearest_numbers(self.bits, choice).to(groups.device)
            for end in (NUMBERS[self.bits][0] - choice, NUMBERS[self.bits][-1] - choice):
                for width in _WIDTHS[self.bits]:
                    tried = _nonzero(outermost * (width / end))
                    steps = _take(numbers, groups / tried)
                    product, square = (groups * steps).sum(-1, keepdim=True), steps.square().sum(-1, keepdim=True)
                    gain = product.square() / square  # by how much this lowers the squared error
                    better = gain > most
                    fitted = torch.where(product != 0, product / square, tried)
                    best = GroupParams(torch.where(better, fitted, best.scale), torch.where(better, choice, best.zero))
                    squares, most = torch.where(better, square, squares), torch.where(better, gain, most)
        return best.scale, best.zero, squares

    def _error(self, groups: Tensor, params: GroupParams) -> Tensor:
        return (self.nearest(groups, params) - groups).square_().sum(-1, keepdim=True)

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        numbers = NUMBERS[self.bits]
        return numbers[0] - zero, numbers[-1] - zero

    def step_below(self, numbers: Tensor) -> Tensor:
        return _take(_steps_below(self.bits).to(numbers.device), numbers)

    def _codes(self, weights: Tensor, params: GroupParams) -> Tensor:
        return _take(_nearest_codes(self.bits).to(weights.device), weights / params.scale + params.zero)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._codes(weights, params)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        numbers = torch.tensor(NUMBERS[self.bits], dtype=torch.float32, device=codes.device)
        return (numbers.index_select(0, codes.int().flatten()).view(codes.shape) - params.zero) * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        numbers = _nearest_numbers(self.bits, 0.0).to(weights.device)
        return (_take(numbers, weights / params.scale + params.zero) - params.zero) * params.scale

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        return {"codes": pack(codes, self.bits)} | self._packed_scales(params)

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        params = self._unpacked_scales(arrays, shape)
        return unpack(arrays["codes"], self.bits, shape), params


_LARGEST = 256  # steps beyond which all have the outermost number


def _take(table: Tensor, steps: Tensor) -> Tensor:
    """The entry of a table for each step: that at the place ``ceil(2 step) + 2 * _LARGEST``."""
    place = (2 * steps).ceil_().nan_to_num_(0.0).clamp_(-2 * _LARGEST, 2 * _LARGEST).add_(2 * _LARGEST)
    return table.index_select(0, place.int().flatten()).view(steps.shape)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < 1e-30, 1e-30, scale)


@cache
def _nearest_codes(bits: int) -> Tensor:
    """The table for `_take` with the codes of the nearest numbers, uint8: boundaries are at halves."""
    numbers = torch.tensor(NUMBERS[bits], dtype=torch.float32)
    halves = torch.arange(-2.0 * _LARGEST, 2 * _LARGEST + 1)
    return torch.bucketize(halves, numbers[1:] + numbers[:-1]).to(torch.uint8)


@cache
def _nearest_numbers(bits: int, zero: float) -> Tensor:
    """The table for `_take` with the nearest numbers, fp32, of groups with this zero point."""
    numbers = torch.tensor(NUMBERS[bits], dtype=torch.float32) - zero
    halves = torch.arange(-2.0 * _LARGEST, 2 * _LARGEST + 1)
    return numbers[torch.bucketize(halves, numbers[1:] + numbers[:-1])]


@cache
def _steps_below(bits: int) -> Tensor:
    """The table for `_take` with the distance of each number to the next one towards zero. The two sets of numbers
    that groups may have are disjoint.
    """
    table = torch.ones(4 * _LARGEST + 1)
    for zero in (0, -SHIFT[bits]):
        numbers = torch.tensor(NUMBERS[bits], dtype=torch.float32) - zero
        gaps = numbers[1:] - numbers[:-1]
        below = torch.where(numbers > 0, torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
        table[(2 * numbers).int() + 2 * _LARGEST] = below
    return table


__all__ = ["NUMBERS", "SHIFT", "IqkGrid"]
