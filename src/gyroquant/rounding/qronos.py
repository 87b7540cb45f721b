"""Qronos (Zhang et al., arXiv 2505.11695): GPTQ towards what a layer gave before the layers in front were rounded.

X are the inputs of the unrounded model, Y those that the layer will see. Algorithm 1 minimises ``|X W^T - Y Q^T|^2`` in
turns, starting from Q = W: (a) one column is rounded to the best number while all others are held, (b) the columns
still free are replaced by their least-squares optimum. We damp it as one problem, as if X and Y both had the further
rows ``sqrt(lambda) I``: what is added to the objective is ``lambda |W - Q|^2``.

With ``H = Y^T Y + lambda I`` and the slope at the start ``D = W (X - Y)^T Y``, the objective is
``(Q - V) H (Q - V)^T`` plus a constant, for ``V = W + D H^-1``: that of GPTQ for another target. A column that is at
its optimum given the others is also the best number for (a), so from the second column on (a) is rounding to nearest
and (b) is GPTQ's update. Only the first (a) meets columns that are not at their optimum: it rounds
``p = W_1 + D_1 / H_11``. What (b) gives is affine in the number that was chosen, so a GPTQ sweep that starts from p in
the first column, and from the optimum given p in all others, takes the steps of Algorithm 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gyroquant.rounding.gptq import ColumnSolver

_POWERS = 32
_ROWS = 1024


def largest_eigenvalue(gram: Tensor) -> float:
    """The largest eigenvalue of second moments, by power iteration: never above the true one, seldom far below."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(gram.shape[0], generator=generator).to(gram)
    value = 0.0
    for _ in range(_POWERS):
        vector = vector / vector.norm().clamp_min(1e-30)
        image = gram @ vector
        value = float(vector @ image)
        vector = image
    return value


def starting_point(weight: Tensor, drift: Tensor, factor: Tensor) -> Tensor:
    """The weights that a GPTQ sweep has to start from to be Qronos, shape (out, in), fp32.

    `factor` is the U of `inverse_factor`; it, the weights and the drift have their columns in the order of the sweep.
    """
    unit = torch.zeros_like(factor[:, :1])
    unit[0] = 1
    first = torch.cholesky_solve(unit, factor, upper=True)[0, 0]  # H_11, for U^T U = H^-1
    drift = drift.double()
    parts = []
    for part in weight.split(_ROWS):
        w = part.double()
        slope = w @ drift
        optimum = w + slope @ factor.T @ factor
        moved = w[:, 0] + slope[:, 0] / first - optimum[:, 0]
        parts.append((optimum + torch.outer(moved, factor[0] / factor[0, 0])).float())
    return torch.cat(parts)


class Qronos(ColumnSolver):
    """Qronos with GPTQ's lazy updates.

    `alpha` times the largest eigenvalue of the second moments is added to their diagonal: the paper has 1e-6, and 1e-3
    when activations are rounded too. Scales are fitted to the corrected weights. Where nothing drifts, at the model's
    first layers for one, the result is that of GPTQ with this damping, code for code.
    """

    name: Literal["qronos"] = "qronos"
    needs_original = True
    alpha: Annotated[float, Field(gt=0, le=1)] = 1e-6

    def damping(self, gram: Tensor) -> float:
        mean = float(gram.diagonal().double().mean())
        return self.alpha * largest_eigenvalue(gram) / mean if mean > 0 else self.alpha

    def corrected(self, weight: Tensor, drift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        return starting_point(weight, drift, factor), None
