"""Integer grids with more bits for the first columns of a row: CoQuant (arXiv 2604.26378), ResQ (arXiv 2412.14363)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids.base import Grid, GroupParams, LeadingOrder
from gyroquant.grids.bitpack import pack, packed_bytes, unpack
from gyroquant.grids.integer import IntegerGrid
from gyroquant.grids.several_widths import APART, SeveralWidthsGrid, Width

_STEP = 8  # the number of leading columns is a multiple of it: all common widths have Hadamard matrices of such orders


def leading_columns(period: int, share: float) -> int:
    """How many of `period` columns are the leading ones: the multiple of 8 nearest to `share` of them, at least 8.

    Raises RecipeError if none would be left.
    """
    count = max(_STEP, _STEP * round(period * share / _STEP))
    if count >= period:
        raise RecipeError(f"{count} leading directions of {period} leave no others: lower share, or leave the site out")
    return count


class LeadingGrid(SeveralWidthsGrid):
    """Integers with `leading_bits` in the first columns of every period, and with `bits` in the others.

    The method `leading` puts the principal directions of a site first. The plan of a run then takes `share` from it,
    and `period` from the site: all inputs of most layers, those of a head at R2. Layers that do not read such a site
    have the `integer` grid of `bits`.

    - `bits`, `leading_bits`: of the other columns, and of the leading ones.
    - `share`: the share of leading columns, to the nearest multiple of 8 (`leading_columns`).
    - `period`: after how many columns the leading ones begin again. -1: a row has one period.
    - `group_size`: for weights, a number that divides both parts of a period. -1 is for activations: the leading
      columns of a period have one scale, the others another.
    - Other settings: as those of the integer grid. Zero points are stored in 8 bits.
    """

    leads: ClassVar[bool] = True

    grid: Literal["leading"] = "leading"
    bits: Width = 4
    leading_bits: Width = 8
    share: Annotated[float, Field(gt=0, lt=1)] = 0.125
    period: int = -1

    @model_validator(mode="after")
    def _consistent(self) -> LeadingGrid:
        if self.leading_bits <= self.bits:
            raise ValueError(f"leading_bits {self.leading_bits} must be more than bits, {self.bits}")
        if self.period != -1 and self.period < 2 * _STEP:
            raise ValueError(f"period {self.period} must be -1, a whole row, or at least {2 * _STEP}")
        _ = self.kinds
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(group_size=16, period=96, share=0.2),
            cls(bits=2, leading_bits=4, group_size=32, period=64, share=0.5, symmetric=True, midrise=True),
            cls(bits=3, leading_bits=8, group_size=16, period=192, share=0.25, scale="minmax", clip=0.9),
        ]

    @property
    def widths(self) -> tuple[int, ...]:
        return self.bits, self.leading_bits

    @property
    def group_bits(self) -> int:
        return 16 if self.symmetric else 24

    @property
    def super_block(self) -> int:
        return 1 if -1 in (self.period, self.group_size) else self.period // self.group_size

    @property
    def _leading(self) -> int:
        return leading_columns(self.period, self.share)

    @property
    def code_bits(self) -> float:
        share = self.share if self.period == -1 else self._leading / self.period
        return self.bits + share * (self.leading_bits - self.bits)

    def for_columns(self, columns: int) -> Grid:
        return self.model_copy(update={"period": columns}) if self.period == -1 else self

    def for_input(self, order: LeadingOrder | None) -> Grid:
        if order is not None:
            return self.model_copy(update={"period": order.period, "share": order.share})
        settings = self.model_dump(exclude={"grid", "leading_bits", "share", "period"})
        return IntegerGrid(**settings)

    def group_of(self, columns: int, name: str = "a weight") -> int:
        whole = columns if self.period == -1 else self.period
        leading = leading_columns(whole, self.share)
        if columns % whole:
            raise RecipeError(f"period {whole} does not divide the {columns} inputs of {name}")
        if self.group_size != -1 and (leading % self.group_size or whole % self.group_size):
            fits = [g for g in range(16, 257) if leading % g == 0 and whole % g == 0]
            advice = f"take {', '.join(map(str, fits))}" if fits else "change share"
            raise RecipeError(
                f"group_size {self.group_size} does not divide the {leading} leading columns of {whole} of {name}: "
                f"{advice}, or put such layers into ignore"
            )
        return columns if self.group_size == -1 else self.group_size

    def check_shape(self, rows: int, columns: int, name: str) -> None:
        if self.group_size == -1:
            raise RecipeError(
                f"the grid leading needs a group_size for weights, such as {self._group_for(columns)} for {name}: "
                "-1 is for activations"
            )
        super().check_shape(rows, columns, name)

    def _group_for(self, columns: int) -> int:
        whole = columns if self.period == -1 else self.period
        leading = leading_columns(whole, self.share)
        return max((g for g in range(16, 257) if leading % g == 0 and whole % g == 0), default=64)

    def weight_bits(self, codes: Tensor, params: GroupParams) -> int:
        rows, columns = codes.shape
        wide = self._wide(columns).sum().item()
        of_codes = rows * (self.leading_bits * wide + self.bits * (columns - wide))
        return int(of_codes) + self.group_bits * params.scale.numel() + self.tensor_bits

    def _wide(self, columns: int) -> Tensor:
        """Which columns are leading ones, bool of shape (columns,)."""
        whole = columns if self.period == -1 else self.period
        return torch.arange(columns) % whole < leading_columns(whole, self.share)

    def fit(self, groups: Tensor) -> GroupParams:
        whole = groups.shape[-2] * self.group_size if self.period == -1 else self.period
        periods = groups.unflatten(-2, (-1, whole // self.group_size))
        first, (narrow, wide) = leading_columns(whole, self.share) // self.group_size, self.kinds
        leading, others = wide.fit(periods[..., :first, :]), narrow.fit(periods[..., first:, :])
        scale = torch.cat([leading.scale, others.scale], -2)
        zero = torch.cat([leading.zero + APART, others.zero], -2)
        return GroupParams(scale.flatten(-3, -2), zero.flatten(-3, -2))

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        own, _, largest = self._split(params.zero)
        numbers = (codes.float() - own) * params.scale
        return numbers.masked_fill_(codes > largest, torch.nan)  # no such code is stored

    def fake(self, x: Tensor) -> Tensor:
        if self.group_size != -1:
            return super().fake(x)
        whole = x.shape[-1] if self.period == -1 else self.period
        self.group_of(x.shape[-1], "an activation")
        periods, leading = x.unflatten(-1, (-1, whole)), leading_columns(whole, self.share)
        narrow, wide = self.kinds
        parts = [wide.fake(periods[..., :leading]), narrow.fake(periods[..., leading:])]
        return torch.cat(parts, -1).flatten(-2)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        wide = self._wide(codes.shape[1])
        streams = [pack(codes[:, wide], self.leading_bits), pack(codes[:, ~wide], self.bits)]
        arrays = {"codes": torch.cat(streams)} | self._half_arrays(params.scale.squeeze(-1))
        return arrays if self.symmetric else arrays | {"zeros": self._split(params.zero)[0].squeeze(-1).to(torch.uint8)}

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        (rows, columns), wide = shape, self._wide(shape[1])
        groups = columns // self.group_of(columns)
        scale = self._half_restored(arrays, (rows, groups)).unsqueeze(-1)
        counts = int(wide.sum()), columns - int(wide.sum())
        sizes = [packed_bytes(rows * counts[0], self.leading_bits), packed_bytes(rows * counts[1], self.bits)]
        if arrays["codes"].numel() != sum(sizes):
            raise InputError(f"a stream of {arrays['codes'].numel()} bytes cannot hold codes of {sum(sizes)} bytes")
        codes, streams = torch.empty(rows, columns, dtype=torch.uint8), arrays["codes"].reshape(-1).split(sizes)
        codes[:, wide] = unpack(streams[0], self.leading_bits, (rows, counts[0]))
        codes[:, ~wide] = unpack(streams[1], self.bits, (rows, counts[1]))
        first = wide[:: self.group_size].expand(rows, groups)
        if self.symmetric:
            narrow, broad = self.kinds
            zero = torch.where(first, broad._middle, narrow._middle).float()
        else:
            zero = self._zeros(arrays, (rows, groups))
        return codes, GroupParams(scale, (zero + APART * first).unsqueeze(-1))

    @staticmethod
    def _zeros(arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        if "zeros" not in arrays or arrays["zeros"].numel() != shape[0] * shape[1]:
            raise InputError("the array of zeros of a rounded weight is missing or has a wrong size")
        return arrays["zeros"].reshape(shape).float()


__all__ = ["LeadingGrid", "leading_columns"]
