"""llama.cpp's K-quants and IQ4_XS: super-blocks of 256 weights whose group scales are whole multiples of one number.

Layouts and decoders: ``ggml-quants.c`` of llama.cpp. The search of scales and offsets follows its idea, least squares
over a few widths of the range, with the multiples tried again once the number of the super-block is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams, stored
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.half_scale import half
from gyroquant.grids.integer import IntegerGrid
from gyroquant.grids.lookup import LookupGrid, iq4_nl, iq4_nl_codes
from gyroquant.grids.super_block import SUPER_BLOCK, SuperBlockGrid

_WIDTHS = tuple(1.0 - 0.05 * i for i in range(-2, 10))  # factors on the range of a group
_SNAP = 2.0**4 + 1  # keeps 20 bits of an fp32 number (Veltkamp); a product of fp16 and 6 bits has at most 17


class _Type(NamedTuple):
    """A type of llama.cpp.

    group: weights that share a multiple of the super-block's scale.
    multiple: bits of that multiple, and of that of the offset.
    offset: whether groups have an offset. If not, multiples have a sign.
    """

    name: str
    group: int
    multiple: int
    offset: bool


_TYPES = {
    2: _Type("Q2_K", 16, 4, True),
    3: _Type("Q3_K", 16, 6, False),
    4: _Type("Q4_K", 32, 6, True),
    5: _Type("Q5_K", 32, 6, True),
    6: _Type("Q6_K", 16, 8, False),
}
_IQ4_XS = _Type("IQ4_XS", 32, 6, False)


class KQuantGrid(SuperBlockGrid):
    """The types Q2_K to Q6_K and IQ4_XS of llama.cpp, exactly as it decodes them. `bits` chooses the type.

    - `four_bits`: the type of 4 bits: `Q4_K` (4.5 true bits, even steps and an offset) or `IQ4_XS` (4.25 true bits, a
      table of 16 numbers).

    A super-block of 256 weights stores an fp16 number d. The scale of each of its groups of 16 or 32 is a whole
    multiple of d. Q2_K, Q4_K and Q5_K store a second fp16 number, and offsets are negative multiples of it:
    ``scale * code - offset``. `GroupParams.zero` is then offset / scale. The largest scale of a super-block always has
    the largest multiple that the type can store, so d follows from the scales.
    """

    has_bit_widths: ClassVar[bool] = True
    scale_step: ClassVar[float] = 1.0  # from once to twice d

    grid: Literal["k_quant"] = "k_quant"
    bits: Annotated[int, Field(ge=2, le=6)] = 4
    group_size: int = 32
    four_bits: Literal["Q4_K", "IQ4_XS"] = "Q4_K"

    @model_validator(mode="before")
    @classmethod
    def _group_of_the_type(cls, settings: Any) -> Any:
        """Adds the group size of the type if none is given."""
        if isinstance(settings, dict) and settings.get("bits", 4) in _TYPES:
            return {"group_size": _TYPES[settings.get("bits", 4)].group} | settings
        return settings

    @classmethod
    def examples(cls) -> list[Self]:
        return [*(cls(bits=bits) for bits in (2, 3, 4, 5, 6)), cls(four_bits="IQ4_XS")]

    def at_bits(self, bits: int) -> Grid:
        return type(self)(bits=bits, four_bits=self.four_bits)

    def for_columns(self, columns: int) -> Grid:
        """As in `Grid`. Rows that 256 does not divide get the smallest grid of at least as many bits in GGUF files."""
        if columns % SUPER_BLOCK == 0 or columns % 32:
            return self
        if self.bits == 2 and columns % 64 == 0:
            return IntegerGrid(bits=2, group_size=64, symmetric=True)  # Q2_0
        if self.bits <= 4:
            return LookupGrid(table="iq4_nl")
        return IntegerGrid(bits=5 if self.bits == 5 else 8, group_size=32, symmetric=True)  # Q5_0, Q8_0

    @property
    def _type(self) -> _Type:
        return _IQ4_XS if self.bits == 4 and self.four_bits == "IQ4_XS" else _TYPES[self.bits]

    @property
    def type_name(self) -> str:
        return self._type.name

    @property
    def _group(self) -> int:
        return self._type.group

    @property
    def holds_zero(self) -> bool:
        return not self._in_table

    @property
    def group_bits(self) -> int:
        numbers = 2 if self._type.offset else 1
        return numbers * (16 // self.super_block + self._type.multiple)

    @property
    def _in_table(self) -> bool:
        return self._type is _IQ4_XS

    @property
    def _levels(self) -> int:
        return int(2**self.bits - 1)

    @property
    def _middle(self) -> float:
        """The code of zero, in types without offset."""
        return 0.0 if self._in_table else float(2 ** (self.bits - 1))

    @property
    def _top(self) -> int:
        """The multiple that the largest scale of a super-block gets: the largest one, or the lowest negative one."""
        return int(2**self._type.multiple - 1 if self._type.offset else -(2 ** (self._type.multiple - 1)))

    def _fitted(self, groups: Tensor) -> GroupParams:
        if self._type.offset:
            free = _free_offsets(groups, self._levels)
            return self._nearest_multiples(groups, self.round_params(*free))
        free_scale = self._free_scales(groups)
        return self._nearest_multiples(groups, self.round_params(free_scale, torch.zeros_like(free_scale)))

    def _free_scales(self, groups: Tensor) -> Tensor:
        """The scales of least squared error of types without offset, not rounded."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        outermost = float(self.range(torch.full_like(low, self._middle))[0].flatten()[0])
        full = torch.where(-low > high, low, high) / outermost
        signs = (1.0, -1.0) if self._in_table else (1.0,)
        return _least_squares(groups, (full * sign * width for sign in signs for width in _WIDTHS), self._steps)

    def _nearest_multiples(self, groups: Tensor, params: GroupParams) -> GroupParams:
        """The best of three neighbouring multiples for each scale, and the best multiple of its offset."""
        number, offset_number = self._numbers(params)
        multiple = torch.round(params.scale / number)
        fixed = multiple == self._top  # or else d would change
        none = (params.zero == 0).all(-2, keepdim=True)  # the super-block has no offsets
        best, offsets, least = (
            multiple,
            params.zero * params.scale,
            torch.full_like(number.expand_as(multiple), torch.inf),
        )
        bottom, top = (1, self._top) if self._type.offset else (self._top, -self._top - 1)
        for move in (0, -1, 1):
            tried = torch.where(fixed, multiple, (multiple + move).clamp(bottom, top))
            tried = torch.where(tried == 0, 1.0, tried)
            scale, offset = number * tried, _offset(params)
            if self._type.offset:
                codes = ((groups + offset) / scale).round_().clamp_(0, self._levels)
                wanted = (scale * codes - groups).mean(-1, keepdim=True)
                highest = (torch.round(offset / offset_number) == self._top) | none
                rounded = torch.round(wanted / offset_number).clamp(0, self._top) * offset_number
                offset = torch.where(highest, offset, rounded)
            error = (
                (self.nearest(groups, GroupParams(scale, self._zero(offset, scale))) - groups).square().sum(-1, True)
            )
            better = error < least
            least = torch.where(better, error, least)
            best, offsets = torch.where(better, tried, best), torch.where(better, offset, offsets)
        scale = number * best
        return GroupParams(scale, self._zero(offsets, scale))

    def _zero(self, offset: Tensor, scale: Tensor) -> Tensor:
        return offset / scale if self._type.offset else torch.full_like(scale, self._middle)

    def _numbers(self, params: GroupParams) -> tuple[Tensor, Tensor]:
        """The fp16 numbers of each super-block, for scales and for offsets, shape (..., 1, 1), of storable params."""
        scale = params.scale.unflatten(-2, (-1, self.super_block))
        number = self._number(scale)
        offset = self._number(_offset(params).unflatten(-2, (-1, self.super_block)))
        shape = params.scale.shape
        spread = [n.expand(*scale.shape).reshape(shape) for n in (number, offset)]
        return spread[0], spread[1]

    def _number(self, values: Tensor) -> Tensor:
        """The fp16 number of each super-block, shape (..., 1, 1), for scales or offsets of shape (..., groups, 1)."""
        largest = values.gather(-2, values.abs().argmax(-2, keepdim=True))
        return half(largest / self._top)

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        shape = scale.shape
        blocks = scale.unflatten(-2, (-1, self.super_block))
        rounded = self._multiples(blocks, 1 if self._type.offset else self._top)
        if not self._type.offset:
            return GroupParams(rounded.view(shape), torch.full_like(scale, self._middle))
        offset = self._multiples((zero * scale).clamp(min=0).unflatten(-2, (-1, self.super_block)), 0)
        return GroupParams(rounded.view(shape), (offset / rounded).view(shape))

    def _multiples(self, values: Tensor, bottom: int) -> Tensor:
        """Values of super-blocks, shape (..., groups, 1), as multiples of one number, the largest as its multiple."""
        number = self._number(values)
        top = self._top if self._type.offset else -self._top - 1
        multiple = torch.round(values / number).clamp(bottom, top)
        if bottom:
            multiple = torch.where(multiple == 0, 1.0, multiple)
        largest = torch.zeros_like(values).scatter_(-2, values.abs().argmax(-2, keepdim=True), 1.0) > 0
        if not bottom:
            largest &= values.abs().amax(-2, keepdim=True) > 0
        return number * torch.where(largest, float(self._top), multiple)

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self._type.offset:
            return super().rescale(params, low, high)
        below = params.zero * low
        steps = (below + (self._levels - params.zero) * high) / self._levels
        return params.scale * steps, below / steps

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        if self._in_table:
            table = iq4_nl()
            return torch.full_like(zero, float(table[0])), torch.full_like(zero, float(table[-1]))
        zero = _shortened(zero)  # as `decode` does
        return -zero, self._levels - zero

    def step_below(self, numbers: Tensor) -> Tensor:
        if not self._in_table:
            return torch.ones_like(numbers)
        table = iq4_nl().to(numbers)
        code = _codes(numbers)
        return (table[1:] - table[:-1])[torch.where(numbers > 0, code - 1, code).clamp(0, len(table) - 2)]

    def _steps(self, groups: Tensor, scale: Tensor) -> Tensor:
        """The nearest numbers in units of the scale, for types without offset."""
        if self._in_table:
            return _take(iq4_nl(), _codes(groups / scale))
        return (groups / scale).round_().clamp_(-self._middle, self._levels - self._middle)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        if self._in_table:
            return _codes(weights / params.scale).to(torch.uint8)
        zero = _offset(params) / params.scale if self._type.offset else self._middle
        return (weights / params.scale + zero).round_().clamp_(0, self._levels).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        if self._in_table:
            return _take(iq4_nl(), codes) * params.scale
        if not self._type.offset:
            return (codes.float() - self._middle) * params.scale
        return codes.float() * params.scale - _offset(params)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        numbers, multiples = self.stored_params(params)
        return {
            "codes": pack(codes, self.bits),
            "scales": numbers.half(),
            "multiples": pack(multiples.to(torch.uint8), self._type.multiple),
        }

    def stored_params(self, params: GroupParams) -> tuple[Tensor, Tensor]:
        """The numbers of super-blocks, fp32, shape (rows, super-blocks, 1 or 2), and the multiples of groups, int16.

        Multiples have shape (rows, super-blocks, groups, 1 or 2), and are not negative: those with a sign are counted
        from the lowest one. The last dimension has scales first, then offsets.
        """
        values = [params.scale, _offset(params)] if self._type.offset else [params.scale]
        blocks = [value.unflatten(-2, (-1, self.super_block)) for value in values]
        numbers = [self._number(block) for block in blocks]
        multiples = [torch.round(block / number) for block, number in zip(blocks, numbers, strict=True)]
        lowest = 0 if self._type.offset else self._top
        return torch.cat(numbers, -1).squeeze(-2), torch.cat(multiples, -1).sub(lowest).to(torch.int16)

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        blocks, kinds = columns // self.group_of(columns) // self.super_block, 2 if self._type.offset else 1
        numbers = stored(arrays, "scales", (rows, blocks, kinds)).float().unsqueeze(-2)
        if "multiples" not in arrays:
            raise InputError("the array of multiples of a rounded weight is missing")
        multiples = unpack(arrays["multiples"], self._type.multiple, (rows, blocks, self.super_block, kinds)).float()
        values = (numbers * (multiples + (0 if self._type.offset else self._top))).flatten(1, 2)
        scale = values[..., :1].contiguous()
        return unpack(arrays["codes"], self.bits, shape), GroupParams(scale, self._zero(values[..., 1:], scale))


def _offset(params: GroupParams) -> Tensor:
    """The offset of each group: a product of an fp16 number and at most 6 bits, which rounding to 20 bits restores."""
    return _shortened(params.zero * params.scale)


def _shortened(x: Tensor) -> Tensor:
    wide = x * _SNAP
    return wide - (wide - x)


def _codes(steps: Tensor) -> Tensor:
    """The codes of the numbers of IQ4_NL that are nearest to steps, int32."""
    return _take(iq4_nl_codes(), (2 * steps).ceil_().clamp_(-254, 254).add_(254))


def _take(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, which torch does slowly. The index holds whole numbers of any dtype."""
    return table.to(index.device).index_select(0, index.int().flatten()).view(index.shape)


def _free_offsets(groups: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points of least squared error, offsets not negative; groups of shape (..., group)."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True)
    full = ((high - low) / levels).clamp_min(1e-30)
    size, total = groups.shape[-1], groups.sum(-1, keepdim=True)
    best, offset, least = full, -low, torch.full_like(low, torch.inf)
    for width in _WIDTHS:
        codes = ((groups - low) / (full * width)).round_().clamp_(0, levels)
        sums, squares = codes.sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
        product = (codes * groups).sum(-1, keepdim=True)
        spread = size * squares - sums.square()
        scale = torch.where(spread > 0, (size * product - sums * total) / spread, full)
        free = (scale * sums - total) / size
        alone = torch.where(squares > 0, product / squares.clamp_min(1), full)
        scale = torch.where(free < 0, alone, scale).clamp_min(1e-30)
        free = free.clamp_min(0)
        again = ((groups + free) / scale).round_().clamp_(0, levels)
        error = (again * scale - free - groups).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best, offset = torch.where(better, scale, best), torch.where(better, free, offset)
    return best, offset / best


def _least_squares(groups: Tensor, scales: Iterable[Tensor], steps: Any) -> Tensor:
    """For each group, the scale of least squared error, each one fitted to the numbers of one of `scales`."""
    best = most = torch.empty(0)
    for scale in scales:
        scale = torch.where(scale.abs() < 1e-30, 1e-30, scale)
        numbers = steps(groups, scale)
        product, squares = (groups * numbers).sum(-1, keepdim=True), numbers.square().sum(-1, keepdim=True)
        gain = product.square() / squares.clamp_min(1e-30)  # by how much the best multiple lowers the squared error
        fitted = torch.where(product != 0, product / squares.clamp_min(1e-30), scale)
        if not most.numel():
            best, most = fitted, gain
            continue
        better = gain > most
        best, most = torch.where(better, fitted, best), torch.where(better, gain, most)
    return best
