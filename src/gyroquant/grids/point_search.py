"""The nearest point of a list for the types of llama.cpp, compiled by numba on first use."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from gyroquant.grids.threads import WORTH_A_THREAD, in_parts

Floats = NDArray[np.float32]
Whole = NDArray[np.int32]

_LAST = 8  # the best scores that are compared one by one


# No reordering of sums, so that results do not depend on the processor's vectors.
_jit: Any = numba.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, error_model="numpy", nogil=True)


@_jit  # type: ignore[untyped-decorator]
def largest(tree: Floats, count: int) -> int:
    """The place of the largest of the first `count` numbers, a power of two of at least 8. The tree has twice as many.

    Each level of the tree has the larger ones of two numbers of the level before, which vector instructions find.
    """
    start, size = 0, count
    while size > _LAST:
        half = size // 2
        low, high = tree[start : start + half], tree[start + half : start + size]
        larger = tree[start + size : start + size + half]
        for v in range(half):
            larger[v] = max(low[v], high[v])
        start, size = start + size, half
    found, top = 0, tree[start]
    for v in range(1, size):
        if tree[start + v] > top:
            found, top = v, tree[start + v]
    while size < count:
        start -= 2 * size
        found += 0 if tree[start + found] == top else size
        size *= 2
    return found


def _compiled(length: int) -> Any:
    """`search` for points of `length` numbers. The compiler must know their number to use vector instructions."""

    @_jit  # type: ignore[untyped-decorator]
    def nearest(sizes: Floats, points: Floats, offset: Floats, tree: Floats) -> tuple[int, float]:
        count = points.shape[1]
        score = tree[:count]
        for v in range(count):
            total = -offset[v]
            for i in range(length):
                total += sizes[i] * points[i, v]
            score[v] = total
        found = largest(tree, count)
        return found, tree[found]

    @_jit  # type: ignore[untyped-decorator]
    def search(
        x: Floats,
        place: Whole,
        near: Floats,
        offset: Floats,
        even: bool,
        index: Whole,
        sign: NDArray[np.int8],
        error: Floats,
    ) -> None:
        width, last = x.shape[1], len(place) - 1
        levels = place[last] + 1
        sizes, tree = np.empty(width, np.float32), np.empty(2 * near.shape[2], np.float32)
        for n in range(len(x)):
            minus, least, energy = 0, 0, np.float32(0)
            for i in range(width):
                negative = x[n, i] < 0
                sizes[i] = abs(x[n, i])
                energy += x[n, i] * x[n, i]
                sign[n, i] = 1 - 2 * negative
                minus += negative
                least = i if sizes[i] < sizes[least] else least
            if even and minus % 2 == 1:
                sizes[least], sign[n, least] = -sizes[least], -sign[n, least]
            for k in range(width // length):
                part, cell = sizes[k * length : (k + 1) * length], 0
                for i in range(length):
                    above = int(min(np.float32(last), np.ceil(2 * part[i])))  # below 0 for NaN, too
                    cell = cell * levels + place[min(max(above, 0), last)]
                found, top = nearest(part, near[cell], offset[cell], tree)
                index[n, k] = cell * near.shape[2] + found
                energy -= 2 * top
            error[n] = energy

    return search


_SEARCH: dict[int, Any] = {}


def nearest_points(
    x: Floats, place: Whole, near: Floats, offset: Floats, even: bool, threads: int = 1
) -> tuple[Whole, NDArray[np.int8], Floats]:
    """The points nearest to the magnitudes of x, shape (vectors, points a vector), the signs of x, and squared errors.

    `x` has shape (vectors, 4 or 8), errors (vectors,). The cell of a part of x is a number with one digit for each
    magnitude m: ``place[ceil(2 m)]``, or the last entry, which is the highest digit. `near` has the points to choose
    from in each cell, shape (cells, length, points), a power of two of them, and `offset` has half of their squares,
    shape (cells, points). A result is its cell times the number of points, plus its place in the cell. With `even`, an
    odd number of minus signs becomes even: the smallest number of a vector gets the other sign, and a negative
    magnitude. All arrays are contiguous.
    """
    length = near.shape[1]
    if length not in _SEARCH:
        _SEARCH[length] = _compiled(length)
    index, sign = np.empty((len(x), x.shape[1] // length), np.int32), np.empty(x.shape, np.int8)
    error, search = np.empty(len(x), np.float32), _SEARCH[length]
    worth = x.size * near.shape[2] >= WORTH_A_THREAD
    in_parts(
        lambda part: search(x[part], place, near, offset, even, index[part], sign[part], error[part]),
        len(x),
        threads if worth else 1,
    )
    return index, sign, error
