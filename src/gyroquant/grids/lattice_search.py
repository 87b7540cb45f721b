"""The nearest point of E8P, compiled by numba on first use."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from gyroquant.grids.point_search import largest

Floats = NDArray[np.float32]
Words = NDArray[np.int64]

_compiled: Any = numba.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, error_model="numpy", nogil=True)
_ROWS = 8  # of a point; a constant, so that loops over them are unrolled
_FAR = np.float32(3e38)


@_compiled  # type: ignore[untyped-decorator]
def nearest_points(x: Floats, weight: Floats, book: Floats, first_odd: int, words: Words, points: Floats) -> None:
    """Writes the words and the points of E8P that are nearest to each row of x, shape (points, 8).

    Errors count by `weight`, same shape. `book` has the magnitudes, shape (8, vectors). Those from `first_odd` on need
    an odd number of minus signs. Words are those of `E8pGrid`.
    """
    vectors = book.shape[1]
    squares = book * book
    size, score, least = np.empty(vectors, np.float32), np.empty(2 * vectors, np.float32), np.empty(vectors, np.float32)
    pull = np.empty(_ROWS, np.float32)
    for n in range(len(x)):
        best = _FAR
        for v in range(vectors):
            total = np.float32(0)
            for i in range(_ROWS):
                total += weight[n, i] * squares[i, v]
            size[v] = total
        for bit in range(2):
            quarter = np.float32(0.25 if bit == 0 else -0.25)
            minus, energy = 0, np.float32(0)
            for i in range(_ROWS):
                y = x[n, i] - quarter
                minus += y < 0
                energy += weight[n, i] * y * y
                pull[i] = weight[n, i] * abs(y)
            # With the wrong number of minus signs, the sign that matters least is the wrong one. That costs 4 |y| b.
            for v in range(vectors):
                total, smallest = np.float32(0), _FAR
                for i in range(_ROWS):
                    product = pull[i] * book[i, v]
                    total += product
                    smallest = product if product < smallest else smallest
                score[v] = 2 * total - size[v]
                least[v] = smallest
            first, last = (0, first_odd) if minus % 2 == 1 else (first_odd, vectors)
            for v in range(first, last):
                score[v] -= 4 * least[v]
            chosen = largest(score, vectors)
            value = score[chosen]
            if energy - value < best:
                best = energy - value
                flipped = -1
                if first <= chosen < last:
                    flipped = 0
                    for i in range(1, _ROWS):
                        if pull[i] * book[i, chosen] < pull[flipped] * book[flipped, chosen]:
                            flipped = i
                word = chosen << 8 | bit
                for i in range(_ROWS):
                    negative = (x[n, i] - quarter < 0) != (i == flipped)
                    points[n, i] = (-book[i, chosen] if negative else book[i, chosen]) + quarter
                    if negative and i > 0:
                        word |= 1 << i
                words[n] = word
