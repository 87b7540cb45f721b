"""Maps made of maps: products, block-diagonal maps, and maps across blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gyroquant.errors import MapError
from gyroquant.maps.base import Map
from gyroquant.maps.elementary import Householder, Identity


@dataclass(frozen=True, eq=False)
class Product(Map):
    """Several maps of one order, applied first to last."""

    parts: tuple[Map, ...]

    def __post_init__(self) -> None:
        orders = {part.n for part in self.parts}
        if len(orders) != 1:
            raise MapError(f"a product needs one or more maps of one order, not orders {sorted(orders)}")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.parts[0].n

    @property
    def cost(self) -> int:
        return sum(part.cost for part in self.parts)

    @property
    def orthogonal(self) -> bool:
        return all(part.orthogonal for part in self.parts)

    @property
    def diagonal(self) -> bool:
        return all(part.diagonal for part in self.parts)

    @property
    def permuting(self) -> bool:
        return all(part.permuting for part in self.parts)

    def _apply(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part._apply(x)
        return x

    def inverse(self) -> Map:
        return Product(tuple(part.inverse() for part in reversed(self.parts)))

    def transpose(self) -> Map:
        return Product(tuple(part.transpose() for part in reversed(self.parts)))


def product(*maps: Map) -> Map:
    """The maps applied first to last, nested products flattened and identities dropped."""
    parts: list[Map] = []
    for m in maps:
        parts += m.parts if isinstance(m, Product) else [m]
    whole = Product(tuple(parts))  # refuses parts of different orders, identities among them
    kept = tuple(part for part in whole.parts if not isinstance(part, Identity)) or whole.parts[:1]
    return kept[0] if len(kept) == 1 else Product(kept)


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Map):
    """Maps side by side: `parts` act on consecutive blocks of coordinates, `repeat` times over.

    ``BlockDiagonal((h,), 9)`` is nine times the same block and costs one batched application.
    """

    parts: tuple[Map, ...]
    repeat: int = 1

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.repeat * sum(part.n for part in self.parts)

    @property
    def cost(self) -> int:
        return self.repeat * sum(part.cost for part in self.parts)

    @property
    def orthogonal(self) -> bool:
        return all(part.orthogonal for part in self.parts)

    @property
    def diagonal(self) -> bool:
        return all(part.diagonal for part in self.parts)

    @property
    def permuting(self) -> bool:
        return all(part.permuting for part in self.parts)

    def _apply(self, x: Tensor) -> Tensor:
        period = x.reshape(*x.shape[:-1], self.repeat, self.n // self.repeat)
        if len(self.parts) == 1:
            return self.parts[0]._apply(period).reshape(x.shape)
        pieces = period.split([part.n for part in self.parts], dim=-1)
        done = [part._apply(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.cat(done, dim=-1).reshape(x.shape)

    def inverse(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(part.inverse() for part in self.parts), self.repeat)

    def transpose(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(part.transpose() for part in self.parts), self.repeat)


@dataclass(frozen=True, eq=False)
class Across(Map):
    """Mixes blocks of `inner` coordinates with each other: coordinate j of every block goes through `map`.

    Its matrix is the Kronecker product of that of `map` and the identity.
    """

    map: Map
    inner: int

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
    def permuting(self) -> bool:
        return self.map.permuting

    def _apply(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.map.n, self.inner).transpose(-1, -2)
        return self.map._apply(parts.contiguous()).transpose(-1, -2).reshape(x.shape)

    def inverse(self) -> Across:
        return Across(self.map.inverse(), self.inner)

    def transpose(self) -> Across:
        return Across(self.map.transpose(), self.inner)


def blocks(part: Map, n: int) -> Map:
    """`part` repeated along the diagonal up to order n. Raises MapError when its order does not divide n."""
    if n % part.n:
        raise MapError(f"blocks of {part.n} do not divide {n}")
    return part if part.n == n else BlockDiagonal((part,), n // part.n)


def fixing_ones(m: Map, tolerance: float = 1e-9) -> Map:
    """An orthogonal map close to `m` that leaves the all-ones vector where it is.

    A LayerNorm subtracts the mean, which commutes with an orthogonal map exactly when the map fixes the all-ones
    vector. A map that does not is followed by the reflection that takes the image of that vector back; a
    block-diagonal map is mended block by block and stays block-diagonal.
    """
    if isinstance(m, BlockDiagonal):
        return BlockDiagonal(tuple(fixing_ones(part, tolerance) for part in m.parts), m.repeat)
    ones = torch.ones(m.n, dtype=torch.float64)
    difference = m.apply(ones) - ones
    if float(difference.norm()) <= tolerance * m.n**0.5:
        return m
    return product(m, Householder(difference))
