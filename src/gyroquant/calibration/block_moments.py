"""Second moments of blocks of coordinates, for maps of blocks: far smaller than those of all coordinates."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from gyroquant.calibration.observers import Observer

WIDEST_BLOCK = 128


class BlockMoments(Observer):
    """Sums of ``x^T x`` over tokens for consecutive blocks of coordinates, as wide as divides n and 128."""

    def __init__(self, n: int):
        width = gcd(n, WIDEST_BLOCK)
        self.sums = torch.zeros(n // width, width, width, dtype=torch.float64)
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        pieces = x.float().reshape(len(x), len(self.sums), -1).transpose(0, 1)
        self.sums += torch.bmm(pieces.mT, pieces).to(self.sums)
        self.count += len(x)

    def blocks(self, size: int) -> Tensor:
        """The sums for blocks of a size that divides the kept ones, shape (n / size, size, size), fp64."""
        inside = self.sums.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (block, row, i, column, j)
        return inside.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 8 * n * gcd(n, WIDEST_BLOCK)
