"""What llama.cpp's types with super-blocks share: 256 weights of a row, whose groups have multiples of one number."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams

SUPER_BLOCK = 256
_PIECE = 1 << 18  # weights that are fitted at once, so that they stay in the cache


class SuperBlockGrid(Grid):
    """A type of llama.cpp with super-blocks of 256 weights. The type fixes the size of groups."""

    @property
    @abstractmethod
    def type_name(self) -> str:
        """llama.cpp's name of the type."""

    @property
    @abstractmethod
    def _group(self) -> int:
        """The weights of a group."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group_size != self._group:
            raise ValueError(f"{self.type_name} has groups of {self._group}: leave group_size out")
        return self

    @property
    def super_block(self) -> int:
        return SUPER_BLOCK // self.group_size

    def fit(self, groups: Tensor) -> GroupParams:
        if not bool(groups.isfinite().all()):
            raise InputError("a group of numbers is not finite")
        together = self.stored_together(groups.shape[-2] * self.group_size)
        flat, shape = groups.reshape(-1, together, self.group_size), (*groups.shape[:-1], 1)
        parts = [self._fitted(part.contiguous()) for part in flat.split(max(1, _PIECE // (together * self.group_size)))]
        scale, zero = (torch.cat([getattr(part, kind) for part in parts]).view(shape) for kind in ("scale", "zero"))
        return GroupParams(scale, zero)

    @abstractmethod
    def _fitted(self, groups: Tensor) -> GroupParams:
        """The parameters of blocks of groups that are stored together, shape (blocks, groups, group)."""

    def _advice(self, columns: int) -> str:
        return "take another grid, or put such layers into weights.ignore"
