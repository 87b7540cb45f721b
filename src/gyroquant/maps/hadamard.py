"""Hadamard and Walsh maps, applied as two-factor Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.maps.base import Identity, Map
from gyroquant.maps.construct import kronecker, require_factors, split

# Number of entries of a piece of rows. Pieces keep the intermediate result in cache.
_CHUNK = 1 << 20


@lru_cache(maxsize=256)
def _sides(n: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The factors ``(A^T, B)`` of ``H = A (x) B``, both orthonormal."""
    left, right = (torch.from_numpy(kronecker(side)) for side in split(n))
    if transposed:
        left, right = left.T, right.T
    a = (left.T.double() / left.shape[0] ** 0.5).to(device=device, dtype=dtype).contiguous()
    b = (right.double() / right.shape[0] ** 0.5).to(device=device, dtype=dtype).contiguous()
    return a, b


@dataclass(frozen=True, eq=False)
class Hadamard(Map):
    """The normalised Hadamard matrix of order n divided by sqrt(n), or its transpose.

    Its first row and column are constant. The constructor raises MapError for orders that `maps.construct.factors`
    cannot factor. Applied as ``A^T X B``, where X is the vector as an (a, b) matrix: n (a + b) multiply-adds.
    """

    n: int
    transposed: bool = False
    orthogonal = True

    def __post_init__(self) -> None:
        require_factors(self.n)

    @property
    def cost(self) -> int:
        left, right = split(self.n)
        return self.n * (int(np.prod(left)) + int(np.prod(right)))

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(24), cls(24, transposed=True)]

    def sides(self) -> tuple[Tensor, Tensor]:
        """The factors ``A^T`` and ``B`` with which the map is applied, fp32."""
        return _sides(self.n, self.transposed, torch.float32, torch.device("cpu"))

    def _apply(self, x: Tensor) -> Tensor:
        a, b = _sides(self.n, self.transposed, x.dtype, x.device)
        shape = x.shape
        x = x.reshape(-1, a.shape[0], b.shape[0])
        step = max(1, _CHUNK // self.n)
        if x.shape[0] <= step or (x.requires_grad and torch.is_grad_enabled()):  # out= has no gradient
            return torch.matmul(a, torch.matmul(x, b)).reshape(shape)
        out = torch.empty_like(x)
        for start in range(0, x.shape[0], step):
            torch.matmul(a, torch.matmul(x[start : start + step], b), out=out[start : start + step])
        return out.reshape(shape)

    def inverse(self) -> Hadamard:
        return Hadamard(self.n, not self.transposed)

    def transpose(self) -> Hadamard:
        return Hadamard(self.n, not self.transposed)


@cache
def sequency_order(n: int) -> Tensor:
    """The column indices of the Hadamard matrix of order n by ascending number of sign changes, shape (n,), int64.

    The changes are counted from the factors, without the matrix. In the column ``u (x) v``, every entry of u repeats
    the changes of v. At the seams, the sign changes where u changes. If the last sign of v differs from its first, it
    changes where u does not.
    """
    changes, ends = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    left, right = split(n)
    for order in reversed((*left, *right)):
        h = kronecker((order,)).astype(np.int64)
        u_changes, u_ends = np.count_nonzero(h[1:] != h[:-1], axis=0), h[0] * h[-1]
        seams = np.where(ends[None, :] > 0, u_changes[:, None], order - 1 - u_changes[:, None])
        changes = (order * changes[None, :] + seams).reshape(-1)
        ends = (u_ends[:, None] * ends[None, :]).reshape(-1)
    return torch.from_numpy(np.argsort(changes, kind="stable"))


@dataclass(frozen=True, eq=False)
class Walsh(Map):
    """The Hadamard matrix of order n with its columns in sequency order, or its transpose.

    For a power of two, this is the Walsh matrix: it is symmetric, and row k changes sign exactly k times. For other
    orders, the columns are sorted by their number of sign changes (GSR, arXiv 2505.03810, section 3).
    """

    n: int
    transposed: bool = False
    orthogonal = True

    def __post_init__(self) -> None:
        require_factors(self.n)

    @property
    def cost(self) -> int:
        return Hadamard(self.n).cost

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(24), cls(24, transposed=True), cls(16)]

    def _apply(self, x: Tensor) -> Tensor:
        order = sequency_order(self.n).to(x.device)
        if self.transposed:
            return Hadamard(self.n, True)._apply(x.index_select(-1, torch.argsort(order)))
        return Hadamard(self.n)._apply(x).index_select(-1, order)

    def inverse(self) -> Walsh:
        return Walsh(self.n, not self.transposed)

    def transpose(self) -> Walsh:
        return Walsh(self.n, not self.transposed)


def hadamard(n: int) -> Map:
    """The orthonormal Hadamard map of order n. Raises MapError, naming a block size that works, if there is none."""
    return Hadamard(n) if n != 1 else Identity(1)


def walsh(n: int) -> Map:
    """The orthonormal Walsh map of order n, in sequency order. Raises MapError as `hadamard` does."""
    return Walsh(n) if n != 1 else Identity(1)
