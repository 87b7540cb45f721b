"""Qronos (Zhang et al., arXiv 2505.11695): GPTQ that approximates a layer's output in the unrounded model.

X are the layer's inputs in the unrounded model, Y those in the rounded model. Algorithm 1 minimises
``|X W^T - Y Q^T|^2``. It starts from Q = W and alternates two steps: (a) it rounds one column to the best number while
all others are fixed; (b) it replaces the columns that are not rounded yet by their least-squares optimum. We damp both
steps as one problem, as if X and Y had the additional rows ``sqrt(lambda) I``. This adds ``lambda |W - Q|^2`` to the
objective.

With ``H = Y^T Y + lambda I`` and the initial slope ``D = W (X - Y)^T Y``, the objective is ``(Q - V) H (Q - V)^T`` plus
a constant, for ``V = W + D H^-1``. That is the objective of GPTQ for another target. If a column is at its optimum
given the others, that optimum is also the best number for (a). So from the second column on, (a) is rounding to nearest
and (b) is GPTQ's update. Only in the first (a) the columns are not at their optimum: it rounds ``p = W_1 + D_1 /
H_11``. The result of (b) is affine in the chosen number. So a GPTQ sweep takes the steps of Algorithm 1 if it starts
from p in the first column, and from the optimum given p in all others.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.rounding.solvers.gptq import ColumnSolver

_POWERS = 32
_ROWS = 1024


def largest_eigenvalue(gram: Tensor) -> float:
    """The largest eigenvalue of second moments, by power iteration: never above the true one, rarely far below it."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(gram.shape[0], generator=generator).to(gram)
    value = 0.0
    for _ in range(_POWERS):
        vector = vector / vector.norm().clamp_min(1e-30)
        image = gram @ vector
        value = float(vector @ image)
        vector = image
    return value


def starting_point(weight: Tensor, input_error_cross: Tensor, factor: Tensor) -> Tensor:
    """The weights from which a GPTQ sweep is Qronos, shape (out, in), fp32.

    `factor` is the U of `inverse_factor`. All three have their columns in the order of the sweep.
    """
    unit = torch.zeros_like(factor[:, :1])
    unit[0] = 1
    first = torch.cholesky_solve(unit, factor, upper=True)[0, 0]  # H_11, for U^T U = H^-1
    input_error_cross = input_error_cross.double()
    parts = []
    for part in weight.split(_ROWS):
        w = part.double()
        slope = w @ input_error_cross
        optimum = w + slope @ factor.T @ factor
        moved = w[:, 0] + slope[:, 0] / first - optimum[:, 0]
        parts.append((optimum + torch.outer(moved, factor[0] / factor[0, 0])).float())
    return torch.cat(parts)


class Qronos(ColumnSolver):
    """Qronos with GPTQ's lazy updates.

    Scales are fitted to the corrected weights. Without input errors, as in the model's first layers, its codes are
    exactly those of GPTQ with this damping.

    - `alpha`: this number times the largest eigenvalue of the second moments is added to their diagonal. Default 1e-6,
      as in the paper, which uses 1e-3 if activations are rounded too.
    """

    name: Literal["qronos"] = "qronos"
    needs_original = True
    alpha: Annotated[float, Field(gt=0, le=1)] = 1e-6

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(alpha=1e-3), cls(alpha=1e-3, act_order=True)]  # 1e-6 is too small for linearly dependent inputs

    def damping(self, gram: Tensor) -> float:
        mean = float(gram.diagonal().double().mean())
        return self.alpha * largest_eigenvalue(gram) / mean if mean > 0 else self.alpha

    def corrected(self, weight: Tensor, input_error_cross: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        return starting_point(weight, input_error_cross, factor), None
