"""The inner loop of `two_sided` for grids of evenly spaced numbers, compiled by numba on first use."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


# No reordering of sums, so that results do not depend on the processor's vectors.
_jit: Any = numba.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, error_model="numpy", nogil=True)


@_jit  # type: ignore[untyped-decorator]
def round_part(
    free: Floats,
    above: Floats,
    scale: Floats,
    zero: Floats,
    inputs: Floats,
    outputs: Floats,
    levels: int,
    codes: NDArray[np.uint8],
    errors: Floats,
    down: Floats,
) -> None:
    """Rounds some rows of some columns, column after column, each from the first row to the last.

    `free`, `above` (what earlier rows subtract), `scale`, `zero`, and the results `codes`, `errors` (along the columns)
    and `down` (along the rows) have shape (columns, rows), `inputs` (columns, columns), `outputs` (rows, rows). All are
    contiguous. Codes are from 0 to `levels`. `free` and `above` are changed.
    """
    columns, rows = free.shape
    for j in range(columns):
        moved = above[j]
        for r in range(rows):
            moved[r] = free[j, r] - moved[r]
        for r in range(rows):
            code = min(max(np.rint(moved[r] / scale[j, r] + zero[j, r]), np.float32(0)), np.float32(levels))
            number = (code - zero[j, r]) * scale[j, r]
            codes[j, r] = np.uint8(code)
            errors[j, r] = (free[j, r] - number) / inputs[j, j]
            error = (moved[r] - number) / outputs[r, r]
            down[j, r] = error
            for s in range(r + 1, rows):
                moved[s] -= error * outputs[r, s]
        for k in range(j + 1, columns):
            share = inputs[j, k]
            for r in range(rows):
                free[k, r] -= share * errors[j, r]


__all__ = ["round_part"]
