"""Scales of ik_llama.cpp's types: from a list of multiples of one number, which a super-block or a whole row has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams, stored
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.half_scale import half
from gyroquant.grids.k_quants import KQuantGrid
from gyroquant.grids.lookup import LookupGrid
from gyroquant.grids.super_block import SUPER_BLOCK, SuperBlockGrid

_SNAP = 2.0**8 + 1  # keeps 16 bits of an fp32 number (Veltkamp), so that its product with 8 bits is exact
_LEAST = 2.0**-60  # of the number of a row in fp32, so that no number of the grid is a subnormal
_FACTORS = tuple(1.0 + 0.02 * i for i in range(-10, 6))  # on the number at which the largest scale is unchanged


class ScaleType(NamedTuple):
    """How a type stores scales.

    name: ik_llama.cpp's name of the type.
    group: weights that share a scale.
    multiples: what the codes of scales stand for.
    choice: the zero point of groups whose bit of choice is set; 0 if there is no such bit.
    by_row: whether the number is one for a whole row, not one for 256 weights.
    in_half: whether the number is stored in fp16, not in fp32.
    """

    name: str
    group: int
    multiples: tuple[int, ...]
    choice: float
    by_row: bool
    in_half: bool


class IkGrid(SuperBlockGrid):
    """A type of ik_llama.cpp. `GroupParams.scale` is a multiple of the number that a super-block or a row stores.

    The largest scale of a super-block or row always has the multiple of largest magnitude, so the number follows from
    the scales.
    """

    has_bit_widths: ClassVar[bool] = True

    @property
    @abstractmethod
    def _scale_type(self) -> ScaleType:
        """How scales are stored."""

    @property
    def type_name(self) -> str:
        return self._scale_type.name

    @property
    def _group(self) -> int:
        return self._scale_type.group

    @property
    def holds_zero(self) -> bool:
        return False

    @property
    def _multiple_bits(self) -> int:
        return (len(self._scale_type.multiples) - 1).bit_length()

    @property
    def group_bits(self) -> int:
        own = self._multiple_bits + bool(self._scale_type.choice)
        return own if self._scale_type.by_row else own + 16 // self.super_block

    @property
    def row_bits(self) -> int:
        if not self._scale_type.by_row:
            return 0
        return 16 if self._scale_type.in_half else 32

    def stored_together(self, columns: int) -> int:
        return columns // self.group_size if self._scale_type.by_row else self.super_block

    def for_columns(self, columns: int) -> Grid:
        """As in `Grid`. Rows that 256 does not divide get IQ4_NL, as in ik_llama.cpp's own quantizer."""
        return self if columns % SUPER_BLOCK == 0 or columns % 32 else LookupGrid(table="iq4_nl")

    def at_bits(self, bits: int) -> Grid:
        return KQuantGrid(bits=bits) if bits > 4 else type(self).model_validate(self._at_bits(bits))

    def _at_bits(self, bits: int) -> dict[str, object]:
        """The settings of this grid with another number of bits."""
        return self.model_dump(exclude={"group_size"}) | {"bits": bits}

    def _fitted(self, groups: Tensor) -> GroupParams:
        scale, zero, squares = self._free(groups)
        number, fixed = self._number(self._best_number(scale, squares)), _largest(scale)
        return self._nearest_multiples(groups, scale, number, fixed, zero)

    def fit_shared(self, groups: Tensor) -> GroupParams:
        if not self._scale_type.by_row:
            return self.fit(groups)
        scale, zero, squares = self._free(groups)
        return self.round_params(self._best_number(scale, squares), zero)

    def refit(self, groups: Tensor, params: GroupParams, first: int) -> GroupParams:
        if not self._scale_type.by_row:
            return self.fit(groups)
        number = self._number(params.scale)
        fixed = _largest(params.scale)[..., first : first + groups.shape[-2], :]
        scale, zero, _ = self._free(groups)
        scale = torch.where(fixed, params.scale[..., first : first + groups.shape[-2], :], scale)
        return self._nearest_multiples(groups, scale, number, fixed, zero)

    @abstractmethod
    def _free(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scales of least squared error, before they become multiples, the zero points that go with them, and the
        sums of the squares of the numbers in units of the scale. All have shape (..., groups, 1).
        """

    def _near(self, ratio: Tensor) -> Iterator[Tensor]:
        """The multiples to try for scales with this ratio to the number: the nearest one and its neighbours."""
        allowed = _sorted(self._scale_type.multiples).to(ratio)
        place = torch.bucketize(ratio.contiguous(), (allowed[1:] + allowed[:-1]) / 2)
        for move in (0, -1, 1):
            yield allowed[(place + move).clamp(0, len(allowed) - 1)]

    @abstractmethod
    def _error(self, groups: Tensor, params: GroupParams) -> Tensor:
        """The squared error of each group, shape (..., groups, 1)."""

    def _best_number(self, scale: Tensor, squares: Tensor) -> Tensor:
        """The scales, with that of the largest one changed so that all others can be near to multiples."""
        best, least, top = scale, torch.full_like(scale.amax(-2, keepdim=True), torch.inf), _largest(scale)
        for factor in _FACTORS:
            tried = torch.where(top, scale * factor, scale)
            number = self._number(tried)
            change = torch.where(top, tried, number * self._multiple(tried / number)) - scale
            error = (change.square() * squares).sum(-2, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best

    def _nearest_multiples(
        self, groups: Tensor, scale: Tensor, number: Tensor, fixed: Tensor, zero: Tensor
    ) -> GroupParams:
        """The best of the multiples from `_near` for each scale, with each zero point. `fixed` scales have the multiple
        of largest magnitude.
        """
        best, least = GroupParams(scale, zero), torch.full_like(scale, torch.inf)
        for choice in (0.0, self._scale_type.choice) if self._scale_type.choice else (0.0,):
            for near in self._near(scale / number):
                multiple = torch.where(fixed, self._top, near)
                tried = GroupParams(number * multiple, torch.full_like(scale, choice))
                error = self._error(groups, tried)
                better = error < least
                least = torch.where(better, error, least)
                best = GroupParams(
                    torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero)
                )
        return best

    @property
    def _top(self) -> float:
        """The multiple of the largest scale."""
        return float(max(self._scale_type.multiples, key=abs))

    def _multiple(self, ratio: Tensor) -> Tensor:
        """The nearest of the multiples."""
        allowed = _sorted(self._scale_type.multiples).to(ratio)
        return allowed[torch.bucketize(ratio.contiguous(), (allowed[1:] + allowed[:-1]) / 2)]

    def _number(self, scale: Tensor) -> Tensor:
        """The number that is stored, shape (..., 1, 1), for scales of shape (..., groups, 1)."""
        number = scale.gather(-2, scale.abs().argmax(-2, keepdim=True)) / self._top
        if self._scale_type.in_half:
            return half(number)
        wide = number * _SNAP
        number = wide - (wide - number)
        return torch.where(number.abs() < _LEAST, _LEAST, number)

    def _in_blocks(self, values: Tensor) -> Tensor:
        """Values of groups, shape (..., groups, 1), with a dimension for what shares a number before the groups."""
        together = values.shape[-2] if self._scale_type.by_row else self.super_block
        return values.unflatten(-2, (-1, together))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        blocks = self._in_blocks(scale)
        number = self._number(blocks)
        multiple = torch.where(_largest(blocks), self._top, self._multiple(blocks / number))
        return GroupParams((number * multiple).view(scale.shape), self._choice(zero))

    def round_within(self, scale: Tensor, zero: Tensor, params: GroupParams, first: int) -> GroupParams:
        if not self._scale_type.by_row:
            return self.round_params(scale, zero)
        number, part = self._number(params.scale), slice(first, first + scale.shape[-2])
        fixed = _largest(params.scale)[..., part, :]
        multiple = torch.where(fixed, self._top, self._multiple(scale / number))
        return GroupParams(number * multiple, self._choice(zero))

    def _choice(self, zero: Tensor) -> Tensor:
        """The nearest zero points that can be stored."""
        choice = self._scale_type.choice
        return torch.where((zero - choice).abs() < zero.abs(), choice, 0.0)

    def stored_scales(self, params: GroupParams) -> tuple[Tensor, Tensor, Tensor]:
        """What a matrix stores for scales: the numbers, fp32, shape (rows, super-blocks or 1), the codes of multiples
        and the bits of choice, both uint8, shape (rows, groups).
        """
        blocks = self._in_blocks(params.scale)
        number = self._number(blocks)
        code = _codes(self._scale_type.multiples)[torch.round(blocks / number).long() + 128]
        return number.flatten(1), code.flatten(1), (params.zero != 0).squeeze(-1).to(torch.uint8)

    def _packed_scales(self, params: GroupParams) -> dict[str, Tensor]:
        numbers, codes, choices = self.stored_scales(params)
        arrays = {"scales": numbers.half() if self._scale_type.in_half else numbers}
        arrays["multiples"] = pack(codes, self._multiple_bits)
        return arrays | ({"choices": pack(choices, 1)} if self._scale_type.choice else {})

    def _unpacked_scales(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> GroupParams:
        rows, columns = shape
        groups = columns // self.group_of(columns)
        numbers = stored(arrays, "scales", (rows, groups // self.stored_together(columns))).float()
        missing = {"multiples", "choices"} - set(arrays) - (set() if self._scale_type.choice else {"choices"})
        if missing:
            raise InputError(f"the array of {min(missing)} of a rounded weight is missing")
        codes = unpack(arrays["multiples"], self._multiple_bits, (rows, numbers.shape[1], groups // numbers.shape[1]))
        if int(codes.max()) >= len(self._scale_type.multiples):
            raise InputError(f"a scale has the multiple {int(codes.max())} of {len(self._scale_type.multiples)}")
        multiples = torch.tensor(self._scale_type.multiples, dtype=torch.float32)[codes.long()]
        scale = (numbers[..., None] * multiples).view(rows, groups, 1)
        if not self._scale_type.choice:
            return GroupParams(scale, torch.zeros_like(scale))
        return GroupParams(scale, unpack(arrays["choices"], 1, (rows, groups, 1)).float() * self._scale_type.choice)


def _largest(scale: Tensor) -> Tensor:
    """Which scale of each block is the largest in magnitude, the first of equals: bool, shape (..., groups, 1)."""
    return torch.zeros_like(scale).scatter_(-2, scale.abs().argmax(-2, keepdim=True), 1.0) > 0


@cache
def _sorted(multiples: tuple[int, ...]) -> Tensor:
    """The multiples but 0, rising, fp32."""
    return torch.tensor(sorted(set(multiples) - {0}), dtype=torch.float32)


@cache
def _codes(multiples: tuple[int, ...]) -> Tensor:
    """The code of each multiple, uint8, at the place of the multiple plus 128."""
    codes = torch.zeros(257, dtype=torch.uint8)
    codes[torch.tensor(multiples) + 128] = torch.arange(len(multiples), dtype=torch.uint8)
    return codes
