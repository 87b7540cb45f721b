"""The triangular factor that a sweep over columns needs, made in place: second moments of wide layers are large."""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.rounding.base import Warn

_BLOCK = 256


def inverse_factor(gram: Tensor, damp_percent: float, warn: Warn = lambda text: None) -> Tensor:
    """The upper Cholesky factor U of the inverse of the damped second moments, ``U^T U = H^-1``, fp64.

    `damp_percent` of the mean diagonal is added to the diagonal. Where the result is still not positive definite, ten
    times as much is tried, with a warning, until it is.
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
            raise InputError("the second moments of a layer's input are not finite; is a weight or an activation NaN?")
        damp = max(10 * damp, 1e-4)
        warn(f"second moments are not positive definite, damping raised to {damp:g} of the mean diagonal")


def _factor(gram: Tensor, damping: Tensor) -> Tensor | None:
    """The factor of `inverse_factor` with `damping` on the diagonal, None where there is none.

    H = R R^T with R upper makes U = R^-1: ``U^T U = R^-T R^-1 = H^-1``. Both steps go block by block in the one copy of
    H in fp64, so memory holds no second matrix, and no product forms the inverse itself.
    """
    h = gram.to(torch.float64, copy=True)
    h.diagonal().add_(damping)
    return invert_upper_(h) if cholesky_upper_(h) and bool(h.diagonal().isfinite().all()) else None


def cholesky_upper_(h: Tensor) -> bool:
    """Makes the upper R with ``R R^T = h`` of a symmetric h, shape (n, n), in its place; whether there is one.

    Only the upper triangle is read; below it there are zeros afterwards.
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
    """The inverse of an upper triangular matrix, in its place."""
    n = len(r)
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        eye = torch.eye(stop - start, dtype=r.dtype, device=r.device)
        corner = torch.linalg.solve_triangular(r[start:stop, start:stop], eye, upper=True)
        # rows from the top: each takes only what is not yet inverted of the rows below it, and itself last
        for above in range(0, start, _BLOCK):
            below = above + _BLOCK
            r[above:below, start:stop] = r[above:below, above:start] @ r[above:start, start:stop] @ -corner
        r[start:stop, start:stop] = corner
    return r


__all__ = ["cholesky_upper_", "inverse_factor", "invert_upper_"]
