"""Numbers from a table: the best ones for a normal distribution, or those of llama.cpp's type IQ4_NL."""

from __future__ import annotations

from functools import cache
from typing import Annotated, ClassVar, Literal

import gguf
import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.special import ndtr, ndtri
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, GroupSize
from gyroquant.grids.exact import prefer_exact
from gyroquant.grids.half_scale import ScaleOnlyGrid

_SEARCH = tuple(1.0 - 0.02 * i for i in range(-10, 36))  # factors on the scale at which no weight is clipped
_ROUNDS = 2000  # of Lloyd's iteration; 8 bits need the most


class LookupGrid(ScaleOnlyGrid):
    """Codes that stand for the numbers of a table, times an fp16 scale for each group.

    `table`:

    - `normal`: the 2^bits numbers with the least squared error for a normal distribution (Lloyd, 1982; Max, 1960).
    - `iq4_nl`: the 16 numbers of llama.cpp's type IQ4_NL, 4 bits. With groups of 32, GGUF files hold such weights.
      The table is not symmetric, so scales may be negative.

    `scale`: `minmax` puts the largest weight of a group on the outermost number of its sign. `mse` takes the scale of
    least squared error among 46 narrower and wider ones.
    """

    has_bit_widths: ClassVar[bool] = True
    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    grid: Literal["lookup"] = "lookup"
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: GroupSize = 32
    table: Literal["normal", "iq4_nl"] = "normal"
    scale: Literal["minmax", "mse"] = "mse"

    @model_validator(mode="after")
    def _consistent(self) -> LookupGrid:
        if self.table == "iq4_nl" and self.bits != 4:
            raise ValueError(f"the table iq4_nl has 16 numbers, so bits must be 4, not {self.bits}")
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(bits=2, group_size=64),
            cls(bits=3, group_size=-1),
            cls(table="iq4_nl"),
            cls(bits=4, group_size=64, scale="minmax"),
            cls(bits=8, group_size=-1),
        ]

    @property
    def numbers(self) -> Tensor:
        """The table, rising, shape (2^bits,), fp32."""
        return _normal(self.bits) if self.table == "normal" else iq4_nl()

    def _outermost(self, groups: Tensor) -> Tensor:
        """The weight of largest magnitude of each group, shape (..., 1)."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        return torch.where(-low > high, low, high)

    def _full_scale(self, groups: Tensor) -> Tensor:
        return self._outermost(groups) / self.numbers[0].to(groups)

    def fit(self, groups: Tensor) -> GroupParams:
        full = self._full_scale(groups)  # the largest magnitude of a table is that of its first number
        if self.scale == "minmax":
            return self.scaled(full)
        signs = (1.0,) if self.table == "normal" else (1.0, -1.0)
        params = self.least_squares(groups, (self.scaled(full * sign * f) for sign in signs for f in _SEARCH))
        tried = self._outermost(groups) / self.numbers.to(groups)
        return prefer_exact(self, groups, params, GroupParams(tried, torch.zeros_like(tried)))

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        numbers = self.numbers
        return torch.full_like(zero, float(numbers[0])), torch.full_like(zero, float(numbers[-1]))

    def step_below(self, numbers: Tensor) -> Tensor:
        table = self.numbers.to(numbers)
        steps = table[1:] - table[:-1]
        code = self._codes(numbers)
        return steps[torch.where(numbers > 0, code - 1, code).clamp(0, len(steps) - 1)]

    def _codes(self, steps: Tensor) -> Tensor:
        table = self.numbers.to(steps)
        return torch.bucketize(steps.contiguous(), (table[1:] + table[:-1]) / 2)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._codes(weights / params.scale).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return self.numbers.to(params.scale)[codes.long()] * params.scale


@cache
def _normal(bits: int) -> Tensor:
    """The table of least squared error for normal numbers of variance 1, by Lloyd's iteration."""
    numbers = ndtri((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(_ROUNDS):
        edges = np.concatenate([[-np.inf], (numbers[1:] + numbers[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
        numbers = -np.diff(density) / np.diff(ndtr(edges))
    return torch.from_numpy((numbers - numbers[::-1]) / 2).float()


@cache
def iq4_nl() -> Tensor:
    """The numbers of llama.cpp's type IQ4_NL, rising, shape (16,), fp32."""
    return torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32)


@cache
def iq4_nl_codes() -> Tensor:
    """The code of the number of IQ4_NL nearest to x, int32, at the place ``ceil(2 x) + 254``: boundaries are halves."""
    table = iq4_nl()
    return torch.bucketize(torch.arange(-254.0, 255.0), table[1:] + table[:-1], out_int32=True)
