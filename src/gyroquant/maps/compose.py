"""Maps made of other maps: block-diagonal maps, and maps that mix blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import MapError
from gyroquant.maps.base import Map, OfParts, product
from gyroquant.maps.elementary import Householder
from gyroquant.maps.hadamard import Hadamard, Walsh


@dataclass(frozen=True, eq=False)
class BlockDiagonal(OfParts, Map):
    """A block-diagonal matrix. `parts` act on consecutive blocks of coordinates; the sequence repeats `repeat` times.

    ``BlockDiagonal((h,), 9)`` has nine equal blocks and is applied in one batch.
    """

    parts: tuple[Map, ...]
    repeat: int = 1

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls((Walsh(8),), 3), cls((Hadamard(8), Householder(torch.arange(4.0))), 2)]

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.repeat * sum(part.n for part in self.parts)

    @property
    def cost(self) -> int:
        return self.repeat * sum(part.cost for part in self.parts)

    def _apply(self, x: Tensor) -> Tensor:
        period = x.reshape(*x.shape[:-1], self.repeat, self.n // self.repeat)
        if len(self.parts) == 1:
            return self.parts[0]._apply(period).reshape(x.shape)
        pieces = period.split([part.n for part in self.parts], dim=-1)
        results = [part._apply(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.cat(results, dim=-1).reshape(x.shape)

    def inverse(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(part.inverse() for part in self.parts), self.repeat)

    def transpose(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(part.transpose() for part in self.parts), self.repeat)


@dataclass(frozen=True, eq=False)
class KroneckerLeft(Map):
    """Mixes blocks of `inner` coordinates with each other: `map` acts on coordinate j of all blocks, for every j.

    Its matrix is the Kronecker product of the matrix of `map` and the identity of order `inner`.
    """

    kind: ClassVar[str] = "across"
    map: Map
    inner: int

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(Hadamard(4), 6), cls(BlockDiagonal((Householder(torch.arange(3.0)),), 2), 4)]

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.map.n * self.inner

    @property
    def cost(self) -> int:
        return self.inner * self.map.cost

    @property
    def orthogonal(self) -> bool:
        return self.map.orthogonal

    @property
    def diagonal(self) -> bool:
        return self.map.diagonal

    @property
    def is_permutation(self) -> bool:
        return self.map.is_permutation

    def _apply(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.map.n, self.inner).transpose(-1, -2)
        return self.map._apply(parts.contiguous()).transpose(-1, -2).reshape(x.shape)

    def inverse(self) -> KroneckerLeft:
        return KroneckerLeft(self.map.inverse(), self.inner)

    def transpose(self) -> KroneckerLeft:
        return KroneckerLeft(self.map.transpose(), self.inner)


def blocks(part: Map, n: int) -> Map:
    """`part`, repeated along the diagonal up to order n. Raises MapError if its order does not divide n."""
    if n % part.n:
        raise MapError(f"blocks of {part.n} do not divide {n}")
    return part if part.n == n else BlockDiagonal((part,), n // part.n)


def preserve_mean(m: Map, tolerance: float = 1e-9) -> Map:
    """An orthogonal map close to `m` that does not change the all-ones vector.

    A LayerNorm subtracts the mean. That commutes with an orthogonal map exactly if the map fixes the all-ones vector.
    If `m` does not, the result is `m` followed by the reflection that takes the image of the vector back. In a
    block-diagonal map every block is corrected by itself, so the map stays block-diagonal.
    """
    if isinstance(m, BlockDiagonal):
        return BlockDiagonal(tuple(preserve_mean(part, tolerance) for part in m.parts), m.repeat)
    ones = torch.ones(m.n, dtype=torch.float64)
    difference = m.apply(ones) - ones
    if float(difference.norm()) <= tolerance * m.n**0.5:
        return m
    return product(m, Householder(difference))
