"""The nearest point of a list for the types of llama.cpp, compiled by numba on first use."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_LAST = 16  # the best scores that are compared one by one


def _compiled(length: int) -> Any:
    """`search` for points of `length` numbers. The compiler must know their number to use vector instructions."""
    # No reordering of sums, so that results do not depend on the processor's vectors.
    compiled: Any = numba.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, error_model="numpy", nogil=True)

    @compiled  # type: ignore[untyped-decorator]
    def nearest(sizes: Floats, points: Floats, offset: Floats, tree: Floats) -> int:
        count = points.shape[1]
        score = tree[:count]
        for v in range(count):
            total = -offset[v]
            for i in range(length):
                total += sizes[i] * points[i, v]
            score[v] = total
        start, size = 0, count
        while size > _LAST:  # each level of the tree has the larger of two scores of the level before
            half = size // 2
            low, high = tree[start : start + half], tree[start + half : start + size]
            larger = tree[start + size : start + size + half]
            for v in range(half):
                larger[v] = max(low[v], high[v])
            start, size = start + size, half
        best = start
        for v in range(start + 1, start + size):
            best = v if tree[v] > tree[best] else best
        top, found = tree[best], best - start
        while size < count:
            start -= 2 * size
            found += 0 if tree[start + found] == top else size
            size *= 2
        return found

    @compiled  # type: ignore[untyped-decorator]
    def search(
        x: Floats, points: Floats, offset: Floats, even: bool, index: NDArray[np.int32], sign: NDArray[np.int8]
    ) -> None:
        width = x.shape[1]
        sizes, tree = np.empty(width, np.float32), np.empty(2 * points.shape[1], np.float32)
        for n in range(len(x)):
            minus, least = 0, 0
            for i in range(width):
                sizes[i] = abs(x[n, i])
                sign[n, i] = -1 if x[n, i] < 0 else 1
                minus += x[n, i] < 0
                least = i if sizes[i] < sizes[least] else least
            if even and minus % 2 == 1:
                sizes[least], sign[n, least] = -sizes[least], -sign[n, least]
            for k in range(width // length):
                index[n, k] = nearest(sizes[k * length : (k + 1) * length], points, offset, tree)

    return search


_SEARCH: dict[int, Any] = {}


def nearest_points(x: Floats, points: Floats, offset: Floats, even: bool) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """The indices of the points nearest to the magnitudes of x, shape (vectors, points a vector), and the signs of x.

    `x` has shape (vectors, 4 or 8); `points` is a list of magnitudes, shape (length, points), a power of two of them,
    and `offset` has half of their squares. With `even`, an odd number of minus signs becomes even: the smallest number
    of a vector gets the other sign, and a negative magnitude. All arrays are contiguous.
    """
    length = len(points)
    if length not in _SEARCH:
        _SEARCH[length] = _compiled(length)
    index, sign = np.empty((len(x), x.shape[1] // length), np.int32), np.empty(x.shape, np.int8)
    _SEARCH[length](x, points, offset, even, index, sign)
    return index, sign
