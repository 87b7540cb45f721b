"""llama.cpp's IQ2 and IQ3 types: 4 or 8 weights of a row at once, from a list of points, with signs beside them.

The lists of points are read from the package gguf. Layouts and decoders: ``ggml-quants.c`` of llama.cpp.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import gguf
import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams, stored
from gyroquant.grids.bitpack import pack, packed_bytes, unpack
from gyroquant.grids.half_scale import half
from gyroquant.grids.k_quants import KQuantGrid
from gyroquant.grids.super_block import SUPER_BLOCK, SuperBlockGrid
from gyroquant.grids.tiled import compiled, has_compiler

_TOP = 31  # scales are odd multiples, 1 to 31, of a number of the super-block
_WIDTHS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)  # factors on the scale at which the largest number meets the largest weight
_NEAR = {8: 32, 4: 16}  # points that a quick search compares, by their length
_SCORES = 1 << 18  # of points that are compared at once, so that they stay in the cache


class _Type(NamedTuple):
    """A type of llama.cpp.

    group: weights that share a scale.
    even: whether 8 weights have an even number of minus signs, so that seven bits store them.
    unit: the fp16 number of a super-block, in units of the smallest scale that it allows.
    """

    group: int
    even: bool
    unit: int


_TYPES = {
    "IQ2_XXS": _Type(32, True, 8),
    "IQ2_XS": _Type(16, True, 8),
    "IQ2_S": _Type(16, False, 8),
    "IQ3_XXS": _Type(32, True, 4),
    "IQ3_S": _Type(32, False, 1),
}


class _Points(NamedTuple):
    """The points of a type.

    magnitudes: the numbers that occur, rising.
    nearest: the nearest magnitude to numbers x that are not negative, by ``ceil(2 x)``: all boundaries are at halves.
    numbers: what each code stands for. Codes are twice the index of a magnitude, plus 1 for negative numbers.
    points: one a row, shape (points, 4 or 8), fp32.
    offset: half the square of each point, shape (points,).
    codes: the codes of each point, uint8, shape of `points`.
    inverse: the index of each point, by its indices as one number; shape (number of magnitudes ^ length,).
    """

    magnitudes: Tensor
    nearest: Tensor
    numbers: Tensor
    points: Tensor
    offset: Tensor
    codes: Tensor
    inverse: Tensor


class IqGrid(SuperBlockGrid):
    """The types IQ2_XXS to IQ3_S of llama.cpp, exactly as it decodes them.

    - `two_bits`: the type of 2 bits: `IQ2_XXS` (2.0625 true bits), `IQ2_XS` (2.3125) or `IQ2_S` (2.5625).
    - `three_bits`: the type of 3 bits: `IQ3_XXS` (3.0625) or `IQ3_S` (3.4375).

    The magnitudes of 8 weights (3 bits: 4) are a point from a list, and their signs are stored beside it. In IQ2_XXS,
    IQ2_XS and IQ3_XXS the number of minus signs among 8 is even. `allocate` may also choose 4, 5 and 6 bits, which are
    IQ4_XS, Q5_K and Q6_K.
    """

    has_bit_widths: ClassVar[bool] = True
    scale_step: ClassVar[float] = 2.0  # from once to three times the smallest

    grid: Literal["iq"] = "iq"
    bits: Literal[2, 3] = 2
    group_size: int = 16
    two_bits: Literal["IQ2_XXS", "IQ2_XS", "IQ2_S"] = "IQ2_XS"
    three_bits: Literal["IQ3_XXS", "IQ3_S"] = "IQ3_XXS"

    @model_validator(mode="before")
    @classmethod
    def _group_of_the_type(cls, settings: Any) -> Any:
        """Adds the group size of the type if none is given."""
        if not isinstance(settings, dict):
            return settings
        key, usual = ("three_bits", "IQ3_XXS") if settings.get("bits") == 3 else ("two_bits", "IQ2_XS")
        name = settings.get(key, usual)
        return {"group_size": _TYPES[name].group} | settings if name in _TYPES else settings

    @classmethod
    def examples(cls) -> list[Self]:
        two = [cls(two_bits=name) for name in ("IQ2_XS", "IQ2_XXS", "IQ2_S")]
        return [*two, *(cls(bits=3, three_bits=name) for name in ("IQ3_XXS", "IQ3_S"))]

    def at_bits(self, bits: int) -> Grid:
        if bits > 3:
            return KQuantGrid(bits=bits, four_bits="IQ4_XS")
        return IqGrid.model_validate({"bits": bits, "two_bits": self.two_bits, "three_bits": self.three_bits})

    def for_columns(self, columns: int) -> Grid:
        """As that of `KQuantGrid`."""
        return self if columns % SUPER_BLOCK == 0 else KQuantGrid(bits=self.bits).for_columns(columns)

    @property
    def type_name(self) -> str:
        return self.two_bits if self.bits == 2 else self.three_bits

    @property
    def _type(self) -> _Type:
        return _TYPES[self.type_name]

    @property
    def _points(self) -> _Points:
        return _points(self.type_name)

    @property
    def _length(self) -> int:
        """The weights of a point."""
        return self._points.points.shape[1]

    @property
    def _index_bits(self) -> int:
        return len(self._points.points).bit_length() - 1

    @property
    def tile_columns(self) -> int:
        return 8 if self._type.even else self._length

    @property
    def _group(self) -> int:
        return self._type.group

    @property
    def holds_zero(self) -> bool:
        return False

    @property
    def code_bits(self) -> float:
        return self._index_bits / self._length + (7 / 8 if self._type.even else 1)

    @property
    def code_count(self) -> int:
        return 2 * len(self._points.magnitudes)

    @property
    def group_bits(self) -> int:
        return 16 // self.super_block + 4

    def _fitted(self, groups: Tensor) -> GroupParams:
        full = groups.abs().amax(-1, keepdim=True) / self._points.magnitudes[-1].to(groups)
        free, most = full, torch.full_like(full, -1.0)
        nearest, sizes = self._points.nearest.to(groups.device), groups.abs()
        for width in _WIDTHS:  # with each weight at its own nearest magnitude, which takes a tenth of the time
            twice = (sizes * (2 / (full * width).clamp_min(1e-30))).ceil_().clamp_(max=len(nearest) - 1)
            numbers = nearest.index_select(0, twice.int().flatten()).view(sizes.shape)
            product, squares = (sizes * numbers).sum(-1, keepdim=True), numbers.square().sum(-1, keepdim=True)
            gain = torch.where(product > 0, product.square() / squares, 0.0)
            better = gain > most
            free, most = torch.where(better, product / squares, free), torch.where(better, gain, most)
        numbers = self._nearest(groups, free.clamp_min(1e-30), quick=True)
        fitted = (groups * numbers).sum(-1, keepdim=True) / numbers.square().sum(-1, keepdim=True)
        scale = self._nearest_multiples(groups, fitted.clamp_min(0))
        return GroupParams(scale, torch.zeros_like(scale))

    def _nearest_multiples(self, groups: Tensor, free: Tensor) -> Tensor:
        """The best of three neighbouring multiples for each scale."""
        number = self._number(free)
        rounded = self.round_params(free, free).scale
        best, least = rounded, torch.full_like(free, torch.inf)
        fixed = torch.round(rounded / number) == _TOP
        for move in (0, -2, 2):
            tried = torch.where(fixed, rounded, number * (torch.round(rounded / number) + move).clamp(1, _TOP))
            errors = self._search(groups / tried, quick=True)[2].view(*groups.shape[:2], -1)
            error = errors.sum(-1, keepdim=True) * tried.square()
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        return best

    def _number(self, scale: Tensor) -> Tensor:
        """The smallest scale of each super-block, shape (..., 1, 1), for scales of shape (..., groups, 1)."""
        return half(scale.amax(-2, keepdim=True) / _TOP * self._type.unit) / self._type.unit

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        blocks = scale.clamp_min(0).unflatten(-2, (-1, self.super_block))
        number = self._number(blocks)
        multiple = (2 * torch.round((blocks / number - 1) / 2) + 1).clamp(1, _TOP)
        largest = torch.zeros_like(blocks).scatter_(-2, blocks.argmax(-2, keepdim=True), 1.0) > 0
        rounded = (number * torch.where(largest, float(_TOP), multiple)).view(scale.shape)
        return GroupParams(rounded, torch.zeros_like(zero))

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.full_like(zero, float(self._points.magnitudes[-1]))
        return -top, top

    def _search(self, steps: Tensor, quick: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest points, as indices, int32, shape (points,), the sign of each weight, int8, shape (-1, 8 or 4),
        and the squared errors, shape (-1,).

        If an odd number of signs has to become even, the smallest weight gets the other sign. With `quick`, points are
        searched only among those near the vector of the weights' own nearest magnitudes, which in 1 of 200 cases misses
        the best one. Without numba, all points are searched.
        """
        if steps.shape[-1] % self.tile_columns:
            raise InputError(f"{self.type_name} codes {self.tile_columns} weights together, not {steps.shape[-1]}")
        vectors = steps.reshape(-1, self.tile_columns).float()
        if vectors.device.type != "cpu" or not has_compiler():
            return self._search_all(vectors)
        nearest_points, cells = compiled("point_search", "nearest_points"), _cells(self.type_name, quick)
        tables = (table.numpy() for table in (cells.place, cells.points, cells.offset))
        found = nearest_points(vectors.detach().contiguous().numpy(), *tables, self._type.even, torch.get_num_threads())
        index, sign, error = map(torch.from_numpy, found)
        return cells.numbers.index_select(0, index.flatten()), sign, error

    def _search_all(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_search`, without numba."""
        sign, sizes = 1 - 2 * (vectors < 0).to(torch.int8), vectors.abs()
        if self._type.even:
            odd = sign.prod(1, keepdim=True).to(torch.int8)
            flipped = torch.ones_like(sign).scatter_(1, sizes.argmin(1, keepdim=True), odd)
            sign, sizes = sign * flipped, sizes * flipped
        offset, points = self._points.offset.to(sizes.device), self._points.points.to(sizes.device)
        parts = sizes.reshape(-1, self._length).split(max(1, _SCORES // len(points)))
        index = torch.cat([torch.addmm(offset, part, points.T, beta=-1).argmax(1) for part in parts])
        return index.int(), sign, (points[index].view_as(sizes) - sizes).square().sum(1)

    def _nearest(self, groups: Tensor, scale: Tensor, quick: bool = False) -> Tensor:
        """The nearest numbers in units of the scale."""
        index, sign, _ = self._search(groups / scale, quick)
        numbers = self._points.points.to(groups.device).index_select(0, index)
        return numbers.view(groups.shape).mul_(sign.view(groups.shape))

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        index, sign, _ = self._search(weights / params.scale)
        codes = self._points.codes.to(weights.device).index_select(0, index).view(weights.shape)
        return codes + (sign.view(weights.shape) < 0)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        numbers = self._points.numbers.to(params.scale.device).index_select(0, codes.flatten().int())
        return numbers.view(codes.shape) * params.scale

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._nearest(weights, params.scale) * params.scale

    def words(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The index of each point, int64, shape (rows, points), and the signs of 8 weights as a byte, (rows, bytes)."""
        base = len(self._points.magnitudes)
        digits = (codes >> 1).unflatten(1, (-1, self._length)).long()
        index = self._points.inverse[(digits * base ** torch.arange(self._length)).sum(-1)]
        signs = (codes & 1).unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
        return index, signs.sum(-1, dtype=torch.uint8)

    def stored_params(self, params: GroupParams) -> tuple[Tensor, Tensor]:
        """The fp16 number of each super-block, fp32, shape (rows, super-blocks), and the multiples' 4 bits, int16."""
        blocks = params.scale.unflatten(-2, (-1, self.super_block))
        number = self._number(blocks)
        multiple = (torch.round(blocks / number) - 1) / 2
        return (number * self._type.unit).flatten(1), multiple.squeeze(-1).to(torch.int16)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        numbers, multiples = self.stored_params(params)
        index, signs = self.words(codes)
        parts = [pack((index & 255).to(torch.uint8), 8)]
        if self._index_bits > 8:
            parts.append(pack((index >> 8).to(torch.uint8), self._index_bits - 8))
        parts.append(pack(signs & 127, 7) if self._type.even else pack(signs, 8))
        return {
            "codes": torch.cat(parts),
            "scales": numbers.half(),
            "multiples": pack(multiples.to(torch.uint8), 4),
        }

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        blocks = columns // self.group_of(columns) // self.super_block
        number = stored(arrays, "scales", (rows, blocks)).float()[..., None, None] / self._type.unit
        if "multiples" not in arrays:
            raise InputError("the array of multiples of a rounded weight is missing")
        multiples = unpack(arrays["multiples"], 4, (rows, blocks, self.super_block, 1)).float()
        scale = (number * (2 * multiples + 1)).flatten(1, 2)
        return self._codes(arrays["codes"], shape), GroupParams(scale, torch.zeros_like(scale))

    def _codes(self, stream: Tensor, shape: tuple[int, int]) -> Tensor:
        """The inverse of the stream in `pack`: low bytes of indices, their other bits, signs."""
        rows, columns = shape
        points, vectors = columns // self._length, columns // 8
        high, sign = self._index_bits - 8, 7 if self._type.even else 8
        sizes = [packed_bytes(rows * points, 8), packed_bytes(rows * points, high), packed_bytes(rows * vectors, sign)]
        if stream.numel() != sum(sizes):
            raise InputError(f"{stream.numel()} bytes cannot hold {rows * columns} codes of {self.type_name}")
        low, more, signs = stream.split(sizes)
        index = unpack(low, 8, (rows, points)).long()
        if high:
            index |= unpack(more, high, (rows, points)).long() << 8
        negative = unpack(signs, sign, (rows, vectors, 1)) >> torch.arange(8, dtype=torch.uint8) & 1
        if self._type.even:
            negative[..., 7] = negative[..., :7].sum(-1) & 1
        return self._points.codes[index].flatten(1) + negative.flatten(1)


@cache
def _points(name: str) -> _Points:
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    points = torch.from_numpy(np.array(kind.grid, dtype=np.float32).reshape(kind.grid_shape))
    magnitudes = points.unique()
    digits = torch.searchsorted(magnitudes, points)
    base, length = len(magnitudes), points.shape[1]
    inverse = torch.zeros(base**length, dtype=torch.int64)
    inverse[(digits * base ** torch.arange(length)).sum(1)] = torch.arange(len(points))
    boundaries = magnitudes[1:] + magnitudes[:-1]  # doubled
    nearest = magnitudes[torch.bucketize(torch.arange(2 * float(magnitudes[-1]) + 1), boundaries)]
    numbers = torch.stack([magnitudes, -magnitudes], 1).flatten()
    offset = points.square().sum(1) / 2
    return _Points(magnitudes, nearest, numbers, points, offset, (2 * digits).to(torch.uint8), inverse)


class _Cells(NamedTuple):
    """The points to choose from in each cell of vectors, for `nearest_points`, and their indices in the list."""

    place: Tensor
    points: Tensor
    offset: Tensor
    numbers: Tensor


@cache
def _cells(name: str, quick: bool) -> _Cells:
    """With `quick`, the cells are those in which numbers have the same nearest magnitudes. Else there is only one."""
    points = _points(name)
    index, place = torch.arange(len(points.points))[None], torch.zeros(1, dtype=torch.int32)
    if quick:
        middles = torch.cartesian_prod(*[points.magnitudes] * points.points.shape[1])
        index = torch.cdist(middles, points.points).topk(_NEAR[points.points.shape[1]], largest=False).indices
        place = torch.searchsorted(points.magnitudes, points.nearest, out_int32=True)
    near = points.points[index].transpose(1, 2).contiguous()
    return _Cells(place, near, points.offset[index], index.flatten().int())
