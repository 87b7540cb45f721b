"""The two factors that a rounded weight may have beside its codes: the weight stands for ``Q + L R``.

Decoding the codes gives Q alone, because the product runs with the model, on inputs that need not be rounded
(`gyroquant.models.execution.low_rank`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError


@dataclass(frozen=True)
class LowRankFactors:
    """L, shape (rows, rank), and R, shape (rank, columns): fp32 numbers that fp16 holds exactly."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Self:
        """The storable factors nearest to ``left @ right``, of any floating-point dtype.

        A column of L and the row of R that it is multiplied by get the same largest magnitude, so that fp16 holds both.
        Raises InputError if it does not.
        """
        ours, theirs = left.abs().amax(0), right.abs().amax(1)
        used = (ours > 0) & (theirs > 0)
        factor = torch.where(used, (theirs / torch.where(used, ours, 1.0)).sqrt(), 1.0)
        halves = (left * factor).half(), (right / factor[:, None]).half()
        if not all(bool(half.isfinite().all()) for half in halves):
            raise InputError(
                "low-rank factors of a layer are not finite or too large for fp16: check the model for weights that "
                "are NaN or infinite, or set weights.low_rank=null"
            )
        return cls(halves[0].float(), halves[1].float())

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def product(self) -> Tensor:
        """``L R``, shape (rows, columns), fp32."""
        return self.left @ self.right

    def without(self, rows: Tensor) -> Self:
        """The factors with zeros in some rows of L; `rows` is bool, shape (rows,)."""
        return type(self)(torch.where(rows[:, None], 0.0, self.left), self.right)

    @staticmethod
    def count_bits(rank: int, rows: int, columns: int) -> int:
        """The bits stored for the factors of a matrix of that shape."""
        return 16 * rank * (rows + columns)

    @property
    def bits(self) -> int:
        """The bits stored for both."""
        return self.count_bits(self.rank, len(self.left), self.right.shape[1])

    def pack(self) -> dict[str, Tensor]:
        """The arrays stored for both."""
        return {"left": self.left.half().contiguous(), "right": self.right.half().contiguous()}

    @classmethod
    def unpack(cls, rank: int, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Self:
        """The inverse of `pack` for a matrix of this shape. Raises InputError if an array does not fit it."""
        for part, expected in (("left", (shape[0], rank)), ("right", (rank, shape[1]))):
            if part not in arrays:
                raise InputError(f"the array of {part} of a rounded weight is missing")
            if tuple(arrays[part].shape) != expected:
                raise InputError(f"{part} of shape {tuple(arrays[part].shape)} where {expected} is expected")
        return cls(arrays["left"].float(), arrays["right"].float())


__all__ = ["LowRankFactors"]
