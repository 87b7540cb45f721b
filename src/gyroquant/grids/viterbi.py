"""The best path through a trellis: the Viterbi algorithm, compiled by numba on first use.

A state is the last `state_bits` bits of a sequence of codes, the newest code on top. So a code of b bits leads from
state s to ``code << (state_bits - b) | s >> b``. Each state stands for one number. A path's cost is the sum of
``r^2 (y^2 - 2 x y)``, with y the number, x the number to code and r its weight: the weighted squared error up to a
constant. States that differ only in their oldest code have the same successors. So a step first takes the smallest
cost among these, and only that is kept for the way back.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from gyroquant.grids.threads import WORTH_A_THREAD, in_parts

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

_FAR = np.float32(1e30)  # the cost of a start that is not allowed


def _compiled(bits: int) -> Any:
    """`search` for codes of `bits` bits. The compiler must know their number to use vector instructions."""
    codes = 1 << bits
    # No reordering of sums, so that results do not depend on the processor's vectors.
    compiled: Any = numba.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, error_model="numpy", nogil=True)

    @compiled  # type: ignore[untyped-decorator]
    def forward(x: Floats, r: Floats, y: Floats, start: int, cost: Floats, kept: Floats) -> None:
        shared = kept.shape[1]
        if start < 0:
            cost[:] = np.float32(0)
        else:
            cost[:] = _FAR
            cost[start] = np.float32(0)
        for t in range(x.shape[0]):
            best = kept[t]
            for m in range(shared):
                least = cost[m * codes]
                for oldest in range(1, codes):
                    other = cost[m * codes + oldest]
                    least = other if other < least else least
                best[m] = least
            square, twice = r[t] * r[t], np.float32(2) * x[t]
            for code in range(codes):  # slices, so that the compiler sees that all three are contiguous
                numbers, after = y[code * shared : (code + 1) * shared], cost[code * shared : (code + 1) * shared]
                for m in range(shared):
                    after[m] = best[m] + square * (numbers[m] * (numbers[m] - twice))

    @compiled  # type: ignore[untyped-decorator]
    def back(x: Floats, r: Floats, y: Floats, kept: Floats, end: int, out: Codes) -> None:
        shared, state = kept.shape[1], end
        for t in range(x.shape[0] - 1, -1, -1):
            out[t] = state // shared
            if t == 0:
                break
            first = state % shared * codes
            square, twice = r[t - 1] * r[t - 1], np.float32(2) * x[t - 1]
            least = np.float32(3e38)
            for s in range(first, first + codes):
                cost = kept[t - 1, s % shared] + square * (y[s] * (y[s] - twice))
                if cost < least:
                    least, state = cost, s

    @compiled  # type: ignore[untyped-decorator]
    def search(x: Floats, r: Floats, y: Floats, out: Codes) -> None:
        count, length = x.shape
        states = y.shape[0]
        middle = length // 2
        cost = np.empty(states, np.float32)
        kept = np.empty((length, states >> bits), np.float32)
        turned_x, turned_r = np.empty(length, np.float32), np.empty(length, np.float32)
        anywhere = np.int64(-1)  # a variable: numba compiles a function once more for a constant as its argument
        for i in range(count):
            # The ends of the sequence meet in the middle of this path, which may start and end in any state.
            for t in range(length):
                turned_x[t], turned_r[t] = x[i, (t + middle) % length], r[i, (t + middle) % length]
            forward(turned_x, turned_r, y, anywhere, cost, kept)
            back(turned_x, turned_r, y, kept, np.argmin(cost), out[i])
            state = np.int64(0)
            for t in range(length):
                state = out[i, (t - middle) % length] * (states >> bits) + (state >> bits)
            forward(x[i], r[i], y, state, cost, kept)
            back(x[i], r[i], y, kept, state, out[i])

    return search


_SEARCH: dict[int, Any] = {}


def best_codes(x: Floats, r: Floats, numbers: Floats, bits: int, threads: int = 1) -> Codes:
    """The codes of sequences, shape (sequences, length), uint8, each of `bits` bits.

    `x` are the numbers to code and `r` their weights, same shape, contiguous; `numbers` has one entry for each state.
    A sequence is tail-biting: its first codes follow on its last ones. Its start is the state in which a path from its
    middle over its end to its middle passes the end (two passes, as in QTIP, arXiv 2406.11235). So the result is not
    always the best one, but nearly.
    """
    if bits not in _SEARCH:
        _SEARCH[bits] = _compiled(bits)
    search, out = _SEARCH[bits], np.empty(x.shape, np.uint8)
    worth = x.size * numbers.size >= WORTH_A_THREAD
    in_parts(lambda part: search(x[part], r[part], numbers, out[part]), len(x), threads if worth else 1)
    return out
