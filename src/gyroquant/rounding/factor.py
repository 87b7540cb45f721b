"""The triangular factor for a sweep over columns. It is computed in place, because second moments of wide layers are
large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.rounding.base import Warn

_BLOCK = 256


def inverse_factor(gram: Tensor, damp_percent: float, warn: Warn = lambda text: None) -> Tensor:
    """The upper Cholesky factor U of the inverse of the damped second moments, ``U^T U = H^-1``, fp64.

    `damp_percent` times the mean of the diagonal is added to the diagonal. As long as the result is not positive
    definite, the function warns and tries ten times as much. Raises InputError if that does not help.
    """
    diagonal = gram.diagonal().double()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    dead = mean * (diagonal == 0).double()
    damp = damp_percent
    while True:
        upper = _factor(gram, dead + damp * mean)
        if upper is not None:
            return upper
        if not damp <= 100:
            raise InputError(
                "the second moments of a layer's input are not finite: check the model for weights or activations "
                "that are NaN or infinite"
            )
        damp = max(10 * damp, 1e-4)
        warn(f"second moments are not positive definite; damping is raised to {damp:g} of the mean diagonal")


def _factor(gram: Tensor, damping: Tensor) -> Tensor | None:
    """The factor of `inverse_factor` with `damping` on the diagonal; None if it does not exist.

    With ``H = R R^T`` and R upper, U is R^-1: ``U^T U = R^-T R^-1 = H^-1``. Both steps work block by block in one fp64
    copy of H. So memory holds no second matrix, and the inverse itself is never formed.
    """
    h = gram.to(torch.float64, copy=True)
    h.diagonal().add_(damping)
    return invert_upper_(h) if cholesky_upper_(h) and bool(h.diagonal().isfinite().all()) else None


def cholesky_upper_(h: Tensor) -> bool:
    """Replaces a symmetric h, shape (n, n), by the upper R with ``R R^T = h``; returns whether R exists.

    Only the upper triangle of h is read. Afterwards the entries below it are zero.
    """
    n = len(h)
    for start in reversed(range(0, n, _BLOCK)):
        stop = min(n, start + _BLOCK)
        panel = h[:stop, start:stop]
        if stop < n:
            panel.addmm_(h[:stop, stop:], h[start:stop, stop:].T, alpha=-1)
        square = panel[start:].triu() + panel[start:].triu(1).T
        lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
        if failed:
            return False
        corner = lower.flip(0, 1)
        panel[start:] = corner
        if start:
            panel[:start] = torch.linalg.solve_triangular(corner.T, panel[:start], upper=False, left=False)
        h[stop:, start:stop] = 0
    return True


def invert_upper_(r: Tensor) -> Tensor:
    """Replaces an upper triangular matrix by its inverse, and returns it."""
    n = len(r)
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        eye = torch.eye(stop - start, dtype=r.dtype, device=r.device)
        corner = torch.linalg.solve_triangular(r[start:stop, start:stop], eye, upper=True)
        # From the top row down: each row block reads only rows below it that are not yet inverted, and itself last.
        for above in range(0, start, _BLOCK):
            below = above + _BLOCK
            r[above:below, start:stop] = r[above:below, above:start] @ r[above:start, start:stop] @ -corner
        r[start:stop, start:stop] = corner
    return r


__all__ = ["cholesky_upper_", "inverse_factor", "invert_upper_"]
