"""QuIP#'s E8P grid: eight rows of a column form one point of the lattice E8, moved by a quarter."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, GroupSize
from gyroquant.grids.tiled import TiledGrid, compiled

_ROWS = 8  # weights of a point
_PIECE = 1 << 14  # points that are compared with all of a book at once
_MAIN = {2: 1.03, 3: 0.98, 4: 1.03}  # the scale for normal numbers of variance 1
_RESIDUAL = {3: 2.04, 4: 3.45}  # what the numbers of the second book are divided by


class E8pGrid(TiledGrid):
    """E8P, the codebook of QuIP# (Tseng et al., arXiv 2402.04396): 16 bits for eight weights.

    A point of eight half-integers with an even sum is given by its magnitudes, one of 256 vectors (8 bits), and by its
    signs: seven are free, the last one makes the sum even. The last bit moves all coordinates by +1/4 or -1/4. The 256
    vectors are all 227 with a squared norm up to 10, and the first 29 of the 56 with five entries of 3/2 and three of
    1/2. QuIP# takes 29 of them too, not necessarily the same.

    3 bits add a book of 256 points of E8 for the remaining error, 4 bits add E8P once more. Both books are searched one
    after the other, so numbers of these grids may get other codes when they are coded again.

    The eight weights are rows of one column (see `TiledGrid`), where QuIP# takes eight columns of one row. A layer's
    number of rows must be a multiple of eight.
    """

    has_bit_widths: ClassVar[bool] = True

    grid: Literal["e8p"] = "e8p"
    bits: Annotated[int, Field(ge=2, le=4)] = 2
    group_size: GroupSize = -1

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(bits=3), cls(bits=4, group_size=64)]

    @property
    def tile_rows(self) -> int:
        return _ROWS

    @property
    def keeps_codes(self) -> bool:
        return self.bits == 2

    @property
    def _factor(self) -> float:
        return _MAIN[self.bits]

    def check(self) -> None:
        compiled("lattice_search", "nearest_points")

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        largest = 2.75 + (2 if self.bits == 3 else 2.75) / _RESIDUAL.get(self.bits, torch.inf)
        return torch.full_like(zero, -largest), torch.full_like(zero, largest)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        steps, relative = self._steps(weights, params)
        word = self._word(steps, relative.square())
        shift = self.bits * torch.arange(_ROWS, device=weights.device)
        return self._rows((word[:, None] >> shift) & (2**self.bits - 1), weights.shape).to(torch.uint8)

    def _word(self, steps: Tensor, weight: Tensor) -> Tensor:
        """The word of 8 * bits bits of every point, shape (points,), for points of shape (points, 8)."""
        word, numbers = _nearest_e8p(steps, weight)
        if self.bits > 2:
            rest, nearest = (steps - numbers) * _RESIDUAL[self.bits], _nearest_e8 if self.bits == 3 else _nearest_e8p
            word = word | nearest(rest, weight)[0] << 16
        return word

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        shift = self.bits * torch.arange(_ROWS, device=codes.device)
        word = (self._vectors(codes).long() << shift).sum(1)
        numbers = _e8p(word & 0xFFFF)
        if self.bits > 2:
            rest = _short_points().to(word.device)[word >> 16] if self.bits == 3 else _e8p(word >> 16)
            numbers += rest / _RESIDUAL[self.bits]
        return self._rows(numbers, codes.shape) * params.scale


@cache
def _magnitudes() -> Tensor:
    """The 256 vectors of magnitudes, shape (256, 8). Those with an odd sum are last."""
    vectors = [[0.5] * _ROWS]
    for count in (1, 2, 3, 4):
        vectors += [[1.5 if i in places else 0.5 for i in range(_ROWS)] for places in combinations(range(_ROWS), count)]
    for large in range(_ROWS):
        vectors.append([2.5 if i == large else 0.5 for i in range(_ROWS)])
        vectors += [
            [2.5 if i == large else 1.5 if i == middle else 0.5 for i in range(_ROWS)]
            for middle in range(_ROWS)
            if middle != large
        ]
    longer = [[1.5 if i in places else 0.5 for i in range(_ROWS)] for places in combinations(range(_ROWS), 5)]
    vectors += longer[: 256 - len(vectors)]
    return torch.tensor(sorted(vectors, key=lambda vector: sum(vector) % 2))


@cache
def _odd() -> Tensor:
    """Whether each vector of magnitudes needs an odd number of minus signs, so that its sum is even."""
    return _magnitudes().sum(1) % 2 == 1


@cache
def _short_points() -> Tensor:
    """256 short points of E8, shape (256, 8): zero, the 240 of squared norm 2, and 15 of squared norm 4."""
    pairs = [(i, j, a, b) for i, j in combinations(range(_ROWS), 2) for a in (1.0, -1.0) for b in (1.0, -1.0)]
    points = torch.zeros(256, _ROWS)
    for row, (i, j, a, b) in enumerate(pairs, 1):
        points[row, i], points[row, j] = a, b
    bits = torch.arange(256)[:, None] >> torch.arange(_ROWS) & 1
    points[113:241] = (0.5 - bits)[bits.sum(1) % 2 == 0]
    points[241:] = 2 * torch.cat([torch.eye(_ROWS), -torch.eye(_ROWS)])[:15]
    return points


@cache
def _every_point() -> Tensor:
    """The points that all 16-bit words stand for, shape (2^16, 8): magnitudes in the high byte, then signs."""
    word = torch.arange(2**16)
    row, low = word >> 8, word & 0xFF
    negative = low[:, None] >> torch.arange(_ROWS) & 1
    # The lowest bit is not the sign of the first entry: it says which way all entries move, and its sign follows.
    quarter = 0.25 - 0.5 * negative[:, :1]
    negative[:, 0] = (negative[:, 1:].sum(1) + _odd()[row].long()) % 2
    return _magnitudes()[row] * (1 - 2 * negative) + quarter


@cache
def _book() -> tuple[NDArray[np.float32], int]:
    """The magnitudes for the search, shape (8, 256), and the number of the first one with an odd sum."""
    return _magnitudes().T.contiguous().numpy(), len(_odd()) - int(_odd().sum())


def _e8p(word: Tensor) -> Tensor:
    """The points of E8P that 16-bit words stand for, shape (points, 8)."""
    return _every_point().to(word.device)[word]


def _nearest_e8p(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The words and the points of E8P that are nearest to x, shape (points, 8), by squared error times `weight`."""
    nearest_points = compiled("lattice_search", "nearest_points")
    words, points = np.empty(len(x), np.int64), np.empty(x.shape, np.float32)
    nearest_points(*(a.contiguous().cpu().numpy() for a in (x, weight)), *_book(), words, points)
    return torch.from_numpy(words).to(x.device), torch.from_numpy(points).to(x.device)


def _nearest_e8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the nearest of `_short_points`, and the points, for x of shape (points, 8)."""
    book = _short_points().to(x)
    pieces = zip(x.split(_PIECE), weight.split(_PIECE), strict=True)
    row = torch.cat([((2 * w * y) @ book.T - w @ book.square().T).argmax(1) for y, w in pieces])
    return row, book[row]
