"""Rotations of the coordinate pairs that RoPE rotates, with one angle for each pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import MapError
from gyroquant.maps.base import Map


@dataclass(frozen=True, eq=False)
class PairRotation(Map):
    """Rotates pair j of the first ``2 p`` of `n` coordinates by ``angles[j]``, shape (p,). The others do not change.

    Pairs are (j, j + p), as in RoPE that rotates halves, or (2 j, 2 j + 1) if `interleaved`. A pair (a, b) becomes
    ``(a cos - b sin, a sin + b cos)``. Such maps commute with RoPE and with each other.
    """

    n: int
    angles: Tensor
    interleaved: bool = False
    orthogonal = True

    def __post_init__(self) -> None:
        if 2 * self.angles.numel() > self.n:
            raise MapError(f"{self.angles.numel()} pairs do not fit into {self.n} coordinates")

    @property
    def cost(self) -> int:
        return 4 * self.angles.numel()

    @classmethod
    def examples(cls) -> list[Self]:
        generator = torch.Generator().manual_seed(5)
        angles = 3 * torch.randn(12, generator=generator)
        return [cls(24, angles), cls(24, angles[:5], interleaved=True)]

    def _apply(self, x: Tensor) -> Tensor:
        first, second = self.split(x)
        cos, sin = self.angles.double().cos().to(x), self.angles.double().sin().to(x)
        rotated = (first * cos - second * sin, first * sin + second * cos)
        pairs = torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)
        return torch.cat([pairs, x[..., 2 * self.angles.numel() :]], dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second members of all pairs, each of shape (..., p)."""
        p = self.angles.numel()
        if self.interleaved:
            return x[..., : 2 * p : 2], x[..., 1 : 2 * p : 2]
        return x[..., :p], x[..., p : 2 * p]

    def inverse(self) -> PairRotation:
        return PairRotation(self.n, -self.angles, self.interleaved)

    def transpose(self) -> PairRotation:
        return self.inverse()
