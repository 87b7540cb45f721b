"""The nearest point of E8P, compiled by numba on first use."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Words = NDArray[np.int64]

_compiled: Any = numba.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, error_model="numpy", nogil=True)


@_compiled  # type: ignore[untyped-decorator]
def nearest_points(
    x: Floats, weight: Floats, book: Floats, odd: NDArray[np.bool_], words: Words, points: Floats
) -> None:
    """Writes the words and the points of E8P that are nearest to each row of x, shape (points, 8).

    Errors count by `weight`, same shape. `book` has the magnitudes, shape (8, vectors), `odd` says which of them need
    an odd number of minus signs. Words are those of `E8pGrid`.
    """
    count, rows = x.shape
    vectors = book.shape[1]
    squares = book * book
    score, least = np.empty(vectors, np.float32), np.empty(vectors, np.float32)
    pull = np.empty(rows, np.float32)
    for n in range(count):
        best = np.float32(3e38)
        for bit in range(2):
            quarter = np.float32(0.25 if bit == 0 else -0.25)
            minus, energy = 0, np.float32(0)
            score[:] = 0
            least[:] = np.float32(3e38)
            for i in range(rows):
                y, w = x[n, i] - quarter, weight[n, i]
                minus += y < 0
                energy += w * y * y
                p = w * abs(y)
                pull[i] = p
                for v in range(vectors):
                    product = p * book[i, v]
                    score[v] += 2 * product - w * squares[i, v]
                    least[v] = product if product < least[v] else least[v]
            # With the wrong number of minus signs, the sign that matters least is the wrong one. That costs 4 |y| b.
            parity = minus % 2 == 1
            chosen, value = 0, np.float32(-3e38)
            for v in range(vectors):
                reached = score[v] - (4 * least[v] if odd[v] != parity else np.float32(0))
                if reached > value:
                    value, chosen = reached, v
            if energy - value < best:
                best = energy - value
                flipped = -1
                if odd[chosen] != parity:
                    flipped = 0
                    for i in range(1, rows):
                        if pull[i] * book[i, chosen] < pull[flipped] * book[flipped, chosen]:
                            flipped = i
                word = chosen << 8 | bit
                for i in range(rows):
                    negative = (x[n, i] - quarter < 0) != (i == flipped)
                    points[n, i] = (-book[i, chosen] if negative else book[i, chosen]) + quarter
                    if negative and i > 0:
                        word |= 1 << i
                words[n] = word
