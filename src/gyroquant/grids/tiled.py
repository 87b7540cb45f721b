"""Grids that code several rows of a column together."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids.base import GroupParams
from gyroquant.grids.half_scale import ScaleOnlyGrid


class TiledGrid(ScaleOnlyGrid):
    """Grids in which `tile_rows` consecutive rows of a column form one vector. Each row has one code of `bits` bits.

    Scales are root mean squares of groups, times a factor of the grid. Numbers are spread as a normal distribution, so
    these grids suit rotated weights. The papers that they come from take vectors along a row. Along a column, solvers
    can still correct the errors of each column in all later ones.
    """

    @property
    @abstractmethod
    def _factor(self) -> float:
        """The best scale for normal numbers of variance 1."""

    def _full_scale(self, groups: Tensor) -> Tensor:
        return root_mean_square(groups) * self._factor

    def fit(self, groups: Tensor) -> GroupParams:
        return self.scaled(self._full_scale(groups))

    def _vectors(self, x: Tensor) -> Tensor:
        """Numbers of shape (rows, ...) as vectors, shape (vectors, tile_rows)."""
        if x.shape[0] % self.tile_rows:
            raise InputError(f"{x.shape[0]} rows cannot be coded {self.tile_rows} together")
        return x.reshape(x.shape[0] // self.tile_rows, self.tile_rows, -1).transpose(1, 2).flatten(0, 1)

    def _rows(self, vectors: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_vectors`."""
        return vectors.view(shape[0] // self.tile_rows, -1, self.tile_rows).transpose(1, 2).reshape(shape)

    def _steps(self, weights: Tensor, params: GroupParams) -> tuple[Tensor, Tensor]:
        """Vectors of weights in units of their scales, fp32, and the scale of each weight relative to the largest one
        of its vector: the error of a weight in such units counts that much.
        """
        scale = self._vectors(params.scale.expand(weights.shape))
        return self._vectors(weights).float() / scale, scale / scale.abs().amax(1, keepdim=True)


def root_mean_square(groups: Tensor) -> Tensor:
    """That of each group of numbers, shape (..., group) to (..., 1)."""
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-38)  # fp32 may not hold the squares
    return (groups / largest).square().mean(-1, keepdim=True).sqrt() * largest


@cache
def has_compiler() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def compiled(module: str, function: str) -> Any:
    """A function of a module of this package that numba compiles. Raises InputError if numba is not installed."""
    try:
        return getattr(import_module(f"gyroquant.grids.{module}"), function)
    except ImportError as error:
        raise InputError(
            f"vectors of weights cannot be coded: {error}; install the compiler with "
            'pip install "gyroquant[vector-grids]"'
        ) from error
