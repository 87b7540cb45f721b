"""Elementary maps: diagonal, signs, permutation, reflection, dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import MapError
from gyroquant.maps.base import Map

ORTHOGONALITY = 1e-6


@dataclass(frozen=True, eq=False)
class Diagonal(Map):
    """Multiplies each coordinate by its own nonzero factor; `values` has shape (n,)."""

    values: Tensor
    orthogonal = False
    diagonal = True

    def __post_init__(self) -> None:
        if not bool((self.values != 0).all() and self.values.isfinite().all()):
            raise MapError("a diagonal map needs finite, nonzero factors: it must be invertible")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.values.numel()

    @property
    def cost(self) -> int:
        return self.n

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(torch.rand(24, generator=torch.Generator().manual_seed(5)) + 0.5)]

    def _apply(self, x: Tensor) -> Tensor:
        return x * self.values.to(x)

    def inverse(self) -> Diagonal:
        return Diagonal(1 / self.values.double())

    def transpose(self) -> Diagonal:
        return self


@dataclass(frozen=True, eq=False)
class Signs(Map):
    """Flips the signs of some coordinates; `values` has shape (n,), dtype int8, entries +-1."""

    values: Tensor
    orthogonal = True
    diagonal = True

    def __post_init__(self) -> None:
        if not bool((self.values.abs() == 1).all()):
            raise MapError("a map of signs needs entries 1 and -1")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.values.numel()

    @property
    def cost(self) -> int:
        return self.n

    @classmethod
    def examples(cls) -> list[Self]:
        signs = torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(5), dtype=torch.int8) * 2 - 1
        return [cls(signs)]

    def _apply(self, x: Tensor) -> Tensor:
        return x * self.values.to(x)

    def inverse(self) -> Signs:
        return self

    def transpose(self) -> Signs:
        return self


def random_signs(n: int, generator: torch.Generator) -> Signs:
    """Independent random signs, each with probability one half."""
    return Signs(torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1)


@dataclass(frozen=True, eq=False)
class Permutation(Map):
    """Reorders coordinates: output j is input ``index[j]``; `index` has shape (n,), an integer dtype."""

    index: Tensor
    orthogonal = True
    is_permutation = True
    cost = 0

    def __post_init__(self) -> None:
        if self.index.dtype not in (torch.int64, torch.int32):
            raise MapError(f"a permutation needs indices of dtype int32 or int64, not {self.index.dtype}")
        if not torch.equal(self.index.sort().values, torch.arange(self.index.numel(), dtype=self.index.dtype)):
            raise MapError(f"not a permutation of 0..{self.index.numel() - 1}: an index is missing or doubled")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.index.numel()

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(torch.randperm(24, generator=torch.Generator().manual_seed(5)))]

    def _apply(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index.to(x.device))

    def inverse(self) -> Permutation:
        return Permutation(torch.argsort(self.index))

    def transpose(self) -> Permutation:
        return self.inverse()


@dataclass(frozen=True, eq=False)
class Householder(Map):
    """The reflection ``I - 2 v v^T / |v|^2``; `vector` is v, shape (n,)."""

    vector: Tensor
    orthogonal = True

    def __post_init__(self) -> None:
        if not bool((self.vector != 0).any()):
            raise MapError("a reflection needs a vector that is not zero")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.vector.numel()

    @property
    def cost(self) -> int:
        return 2 * self.n

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(torch.randn(24, generator=torch.Generator().manual_seed(5)))]

    def _apply(self, x: Tensor) -> Tensor:
        v = self.vector.to(x)
        return x - (x @ v).unsqueeze(-1) * (v * (2 / (v @ v)))

    def inverse(self) -> Householder:
        return self

    def transpose(self) -> Householder:
        return self


@dataclass(frozen=True, eq=False)
class Dense(Map):
    """Any invertible matrix, shape (n, n)."""

    matrix: Tensor
    array_dims = 2

    def __post_init__(self) -> None:
        if self.matrix.dim() != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise MapError(f"a dense map needs a square matrix, not one of shape {tuple(self.matrix.shape)}")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.matrix.shape[0]

    @property
    def cost(self) -> int:
        return self.n * self.n

    @classmethod
    def examples(cls) -> list[Self]:
        generator = torch.Generator().manual_seed(5)
        matrix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
        return [cls(torch.linalg.qr(matrix).Q.contiguous()), cls(matrix + 4 * torch.eye(24))]

    @cached_property
    def _gram_error(self) -> float:
        m = self.matrix.detach().double()
        return float((m @ m.T - torch.eye(self.n, dtype=m.dtype, device=m.device)).abs().max())

    @property
    def orthogonal(self) -> bool:
        return self._gram_error < ORTHOGONALITY

    @cached_property
    def diagonal(self) -> bool:
        return torch.equal(self.matrix.detach(), torch.diag(self.matrix.detach().diagonal()))

    def _apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x)

    def inverse(self) -> Dense:
        return self.transpose() if self.orthogonal else Dense(torch.linalg.inv(self.matrix.double()))

    def transpose(self) -> Dense:
        return Dense(self.matrix.T.contiguous())


def random_orthogonal(n: int, generator: torch.Generator) -> Dense:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian matrix with the signs of R fixed."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Dense(q * r.diagonal().sign())
