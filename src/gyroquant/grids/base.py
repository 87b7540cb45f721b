"""What a grid is: a set of representable numbers with its scales, one set for each group of weights in a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gyroquant.errors import InputError, RecipeError


@dataclass(frozen=True)
class GroupParams:
    """The scales of some groups, exactly as they will be stored.

    `scale` and `zero` have the shape of the groups' weights with the last dimension 1; fp32 values that the stored type
    holds exactly. `zero` is a code, in units of one step.
    """

    scale: Tensor
    zero: Tensor

    def __getitem__(self, index: Any) -> GroupParams:
        return GroupParams(self.scale[index], self.zero[index])


class Grid(BaseModel, ABC):
    """A kind of number grid with its settings. Subclasses register themselves under their `grid` name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kinds: ClassVar[dict[str, type[Grid]]] = {}

    grid: str
    bits: int
    group_size: int

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        Grid.kinds[cls.model_fields["grid"].default] = cls

    def group_of(self, columns: int, name: str = "a weight") -> int:
        """The group size for rows of this many weights. Raises RecipeError when it does not divide them."""
        if self.group_size == -1:
            return columns
        if columns % self.group_size:
            fits = [g for g in (16, 32, 64, 128, 256) if columns % g == 0]
            advice = f"use {', '.join(map(str, fits))} or -1 (one group a row)" if fits else "use -1 (one group a row)"
            raise RecipeError(f"group_size {self.group_size} does not divide the {columns} inputs of {name}; {advice}")
        return self.group_size

    @abstractmethod
    def fit(self, groups: Tensor) -> GroupParams:
        """Scales for groups of weights, shape (..., group), fp32."""

    @abstractmethod
    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        """The nearest codes, uint8, for weights of shape (..., k) whose scales are `params`."""

    @abstractmethod
    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        """The numbers that codes stand for, fp32."""

    def fake(self, x: Tensor) -> Tensor:
        """`x`, shape (..., n), as the grid would hold it, with scales found for each group of its last dimension."""
        groups = x.float().unflatten(-1, (-1, self.group_of(x.shape[-1], "an activation")))
        params = self.fit(groups)
        return self.decode(self.encode(groups, params), params).flatten(-2).to(x.dtype)

    @abstractmethod
    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        """What is stored for a weight: codes of shape (rows, columns), params of shape (rows, groups, 1)."""

    @abstractmethod
    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        """The inverse of `pack`. Raises InputError for arrays of a wrong size."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight matrix: codes of shape (rows, columns), uint8, and scales of shape (rows, groups, 1)."""

    grid: Grid
    codes: Tensor
    params: GroupParams

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, shape (rows, columns), fp32."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, self.params.scale.shape[1], -1)
        return self.grid.decode(groups, self.params).view(rows, columns)

    def pack(self) -> dict[str, Tensor]:
        return self.grid.pack(self.codes, self.params)


def stored_bits(arrays: dict[str, Tensor]) -> int:
    """The bits that arrays take in a file."""
    return sum(array.numel() * array.element_size() * 8 for array in arrays.values())


def grid_from(spec: dict[str, Any]) -> Grid:
    """A grid from its saved description. Raises InputError for an unknown kind."""
    kind = Grid.kinds.get(spec.get("grid", ""))
    if kind is None:
        raise InputError(f"unknown grid {spec.get('grid')!r}; this version knows {', '.join(sorted(Grid.kinds))}")
    return kind(**spec)
