"""Butterflies: log2(n) stages of plane rotations of coordinates that are 1, 2, 4, ... apart.

ButterflyQuant (arXiv 2509.09679) learns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import MapError
from gyroquant.maps.base import Map


@dataclass(frozen=True, eq=False)
class Butterfly(Map):
    """A product of log2(n) stages, each n/2 rotations of two coordinates; n is a power of two.

    `angles` has shape (log2(n), n/2). Stage k rotates the pairs (i, i + 2^k), in ascending order of i, by the angles
    ``angles[k]``: ``(a, b) -> (a cos - b sin, a sin + b cos)``. Differentiable in the angles. `transposed` gives the
    inverse. If all angles are pi/4, the matrix is Sylvester's Hadamard matrix over sqrt(n), up to the signs of its
    rows.
    """

    angles: Tensor
    transposed: bool = False
    orthogonal = True
    array_dims = 2

    def __post_init__(self) -> None:
        shape = tuple(self.angles.shape)
        if len(shape) != 2 or shape[0] < 1 or 2 ** shape[0] != 2 * shape[1]:
            raise MapError(f"a butterfly of order 2^k needs angles of shape (k, 2^(k-1)), not {shape}")

    @property
    def n(self) -> int:  # type: ignore[override]
        return 2 * self.angles.shape[1]

    @property
    def cost(self) -> int:
        return 4 * self.angles.numel()

    @classmethod
    def examples(cls) -> list[Self]:
        angles = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
        return [cls(angles), cls(angles, transposed=True)]

    def _apply(self, x: Tensor) -> Tensor:
        angles = self.angles.to(device=x.device, dtype=torch.float64)
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        stages = range(len(angles))
        shape = x.shape
        for k in reversed(stages) if self.transposed else stages:
            pairs = x.reshape(*shape[:-1], self.n >> (k + 1), 2, 2**k)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            c, s = cos[k].view(-1, 2**k), sin[k].view(-1, 2**k)
            if self.transposed:
                s = -s
            x = torch.stack((a * c - b * s, a * s + b * c), dim=-2)
        return x.reshape(shape)

    def inverse(self) -> Butterfly:
        return Butterfly(self.angles, not self.transposed)

    def transpose(self) -> Butterfly:
        return Butterfly(self.angles, not self.transposed)


def butterfly(n: int, angle: float = pi / 4) -> Butterfly:
    """The butterfly of order n with the same angle everywhere.

    Raises MapError, which names a block size that works, if n is not a power of two.
    """
    if n < 2 or n & (n - 1):
        block = n & -n
        advice = f"; use blocks of {block}, the largest power of two that divides it" if block > 1 else ""
        raise MapError(f"a butterfly needs a power of two, not {n}{advice}")
    return Butterfly(torch.full((n.bit_length() - 1, n // 2), angle, dtype=torch.float64))
