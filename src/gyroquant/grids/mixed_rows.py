"""Integer grids whose rows have different numbers of bits (MixLLM, arXiv 2412.14590)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import GroupParams, QuantizedWeight, stored
from gyroquant.grids.bitpack import pack, packed_bytes, unpack
from gyroquant.grids.integer import IntegerGrid
from gyroquant.grids.several_widths import APART, SeveralWidthsGrid, Width


class MixedRowsGrid(SeveralWidthsGrid):
    """Each row has the numbers of an integer grid of one of several numbers of bits.

    `weights.allocate` with `granularity: rows` makes it. The rows of a layer are rounded on the integer grids of their
    widths (`kinds`), and `joined` puts them together: rows of a layer are independent of each other for every solver.

    Without rows from `joined`, every row has the most bits.

    - `bits`: the most bits of a row. `narrower`: the others, in any order.
    - Other settings: as those of the integer grid.

    Stored are the codes of all rows of the fewest bits, then those of the next more, each a whole number of bytes; the
    zero points in the same order; the scales in the order of rows; and the place of each row's width, as `choices`,
    with as many bits as the number of widths needs.
    """

    by_rows: ClassVar[bool] = True

    grid: Literal["mixed_rows"] = "mixed_rows"
    bits: Width = 4
    narrower: Annotated[tuple[Width, ...], Field(min_length=1)] = (2,)

    @model_validator(mode="after")
    def _consistent(self) -> MixedRowsGrid:
        if max(self.narrower) >= self.bits or len(set(self.narrower)) < len(self.narrower):
            raise ValueError(f"narrower {list(self.narrower)} must be different numbers below bits, {self.bits}")
        _ = self.kinds
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(bits=4, narrower=(2,), group_size=64),
            cls(bits=4, narrower=(2, 3), group_size=-1, symmetric=True, midrise=True),
            cls(bits=8, narrower=(1, 2, 4), group_size=32, scale="minmax", clip=0.9),
            cls(bits=3, narrower=(1,), group_size=16, symmetric=True),
        ]

    @classmethod
    def of(cls, grid: IntegerGrid, widths: Iterable[int]) -> Self:
        """The grid of rows that have an integer grid with one of these numbers of bits."""
        *narrower, bits = sorted(set(widths))
        return cls(**grid.model_dump() | {"grid": "mixed_rows", "bits": bits, "narrower": tuple(narrower)})

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of bits that a row may have, the fewest first."""
        return (*sorted(self.narrower), self.bits)

    @property
    def row_bits(self) -> int:
        """The bits stored for a row that say how many bits its codes have."""
        return len(self.narrower).bit_length()

    @property
    def group_bits(self) -> int:
        """The bits stored for a group of a row of the most bits, besides its codes."""
        return self.kinds[-1].group_bits

    def weight_bits(self, codes: Tensor, params: GroupParams) -> int:
        sizes = torch.tensor(self.row_sizes(codes.shape[1]))
        return int(sizes[self.places(params).cpu()].sum()) + self.tensor_bits

    def row_sizes(self, columns: int) -> tuple[int, ...]:
        """The bits stored for a row of `columns` weights of each of `widths`."""
        groups = columns // self.group_of(columns)
        return tuple(kind.bits * columns + kind.group_bits * groups + self.row_bits for kind in self.kinds)

    @property
    def most_padding(self) -> int:
        """The most bits by which the stored arrays of a weight exceed `weight_bits`."""
        return 7 * (len(self.widths) * (1 if self.symmetric else 2) + 1)

    def places(self, params: GroupParams) -> Tensor:
        """The place of each row's width among `widths`, int64 of shape (rows,); params of shape (rows, groups, 1)."""
        return self._place(params.zero[:, 0, 0])

    def joined(self, parts: Sequence[tuple[Tensor, QuantizedWeight]]) -> QuantizedWeight:
        """A matrix from its rows of each width: their indices, int64, and their weight on one of `kinds`.

        Every row is in one of the parts. Raises ValueError for a part whose grid is not one of `kinds`.
        """
        rows = torch.cat([index for index, _ in parts])
        order = torch.empty_like(rows)
        order[rows] = torch.arange(len(rows), device=rows.device)
        zeros = [part.params.zero + APART * self.widths.index(part.grid.bits) for _, part in parts]
        codes, scale = (torch.cat(each) for each in zip(*((w.codes, w.params.scale) for _, w in parts), strict=True))
        return QuantizedWeight(self, codes[order], GroupParams(scale[order], torch.cat(zeros)[order]))

    def part(self, weight: QuantizedWeight, place: int) -> QuantizedWeight:
        """The rows of one width, as a weight on its integer grid."""
        index = self.places(weight.params) == place
        params = GroupParams(weight.params.scale[index], weight.params.zero[index] - APART * place)
        return QuantizedWeight(self.kinds[place], weight.codes[index], params)

    def fit(self, groups: Tensor) -> GroupParams:
        params = self.kinds[-1].fit(groups)
        return GroupParams(params.scale, params.zero + APART * len(self.narrower))

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        weight, count = QuantizedWeight(self, codes, params), len(self.widths)
        parts = [self.part(weight, place) for place in range(count)]
        arrays = {"codes": torch.cat([pack(part.codes, part.grid.bits) for part in parts])}
        arrays |= self._half_arrays(params.scale.squeeze(-1))
        arrays["choices"] = pack(self.places(params).to(torch.uint8), self.row_bits)
        if not self.symmetric:
            zeros = [pack(part.params.zero.to(torch.uint8), part.grid.bits) for part in parts]
            arrays["zeros"] = torch.cat(zeros)
        return arrays

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        (rows, columns), kinds = shape, self.kinds
        groups = columns // self.group_of(columns)
        scale = self._half_restored(arrays, (rows, groups)).unsqueeze(-1)
        packed = stored(arrays, "choices", (packed_bytes(rows, self.row_bits),))
        places = unpack(packed, self.row_bits, (rows,)).long()
        if rows and int(places.max()) >= len(kinds):
            raise InputError(f"a row has the width {int(places.max())} of {len(kinds)}")
        indices = [(places == place).nonzero()[:, 0] for place in range(len(kinds))]
        codes = torch.cat(_streams(arrays, "codes", kinds, indices, columns))
        order = torch.cat(indices).argsort()
        if self.symmetric:
            middles = [
                torch.full((len(index), groups), kind._middle) for kind, index in zip(kinds, indices, strict=True)
            ]
        else:
            middles = [zero.float() for zero in _streams(arrays, "zeros", kinds, indices, groups)]
        zero = torch.cat([own + APART * place for place, own in enumerate(middles)])
        return codes[order], GroupParams(scale, zero[order].unsqueeze(-1))


def _streams(
    arrays: dict[str, Tensor], part: str, kinds: Sequence[IntegerGrid], indices: Sequence[Tensor], columns: int
) -> list[Tensor]:
    """The codes of the rows of each width, uint8 of shape (rows, columns). Raises InputError for a wrong length."""
    sizes = [packed_bytes(len(index) * columns, kind.bits) for kind, index in zip(kinds, indices, strict=True)]
    stream = arrays[part] if part in arrays else stored(arrays, part, (sum(sizes),))
    if stream.numel() != sum(sizes):
        raise InputError(f"a stream of {stream.numel()} bytes cannot hold {part} of rows that take {sum(sizes)} bytes")
    pieces = stream.reshape(-1).split(sizes)
    return [
        unpack(piece, kind.bits, (len(index), columns))
        for piece, kind, index in zip(pieces, kinds, indices, strict=True)
    ]


__all__ = ["MixedRowsGrid"]
