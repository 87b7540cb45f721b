"""What llama.cpp's types with super-blocks share: 256 weights of a row, whose groups have multiples of one number."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import model_validator
from typing_extensions import Self

from gyroquant.grids.base import Grid

SUPER_BLOCK = 256


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

    def _advice(self, columns: int) -> str:
        return "take another grid, or put such layers into weights.ignore"
