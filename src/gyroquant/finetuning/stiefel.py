"""Gradient steps that keep a matrix orthogonal: Cayley SGD (Li et al., arXiv 2002.01113), as SpinQuant uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ITERATIONS = 5  # of the fixed-point iteration that replaces the inverse in Cayley's transform


def scheduled(lr: float, step: int, steps: int, schedule: str) -> float:
    """The step length at `step` of `steps`."""
    left = 1 - step / steps
    return lr * {"cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))), "linear": left, "constant": 1.0}[schedule]


@dataclass
class CayleySGD:
    """Steps for matrices of shape (blocks, n, n), each block orthogonal. `velocity` is kept between steps.

    With X the transpose of a matrix and V the velocity (the negative gradient of X, without momentum), a step goes
    along the curve ``Y = X + a A (X + Y) / 2`` with the skew-symmetric ``A = W - W^T``,
    ``W = V X^T - X (X^T V X^T) / 2``. The length a is `lr` at most, and no more than ``1 / |A|_1``.
    """

    momentum: float = 0.0
    velocity: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, name: str, matrix: Tensor, gradient: Tensor, lr: float) -> Tensor:
        """The matrix after one step, fp64. The step is computed in fp32, then orthogonality is restored."""
        matrix, gradient = matrix.float(), gradient.float()
        x = matrix.transpose(-1, -2)
        v = -gradient.transpose(-1, -2)
        if self.momentum and name in self.velocity:
            v = self.momentum * self.velocity[name] + v
        m = v @ matrix
        w = m - 0.5 * (x @ (matrix @ m))
        a = w - w.transpose(-1, -2)
        length = (1 / (a.abs().sum(-2).amax(-1) + 1e-8)).clamp(max=lr)[:, None, None]
        y = x + length * v
        for _ in range(_ITERATIONS):
            y = x + length * (a @ (0.5 * (x + y)))
        if self.momentum:
            self.velocity[name] = a @ x
        return orthogonalized(y.transpose(-1, -2))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Makes nearly orthogonal blocks orthogonal to fp64: two Newton steps towards the nearest orthogonal matrix."""
    r = matrix.double()
    for _ in range(2):
        r = 1.5 * r - 0.5 * r @ (r.transpose(-1, -2) @ r)
    return r


def drift(matrix: Tensor) -> float:
    """The deviation of blocks from orthogonal: the largest entry of ``|R R^T - I|``."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return float((matrix @ matrix.transpose(-1, -2) - eye).abs().max())
