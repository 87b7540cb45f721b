"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ that also corrects the input error of a layer.

X are the layer's inputs in the unrounded model, Y those in the rounded model. When column q is rounded, GPTQ spreads
the error of q over the columns F that are not rounded yet. GPTAQ also adds to them the least-squares correction of the
input error of column q, ``w_q (X_q - Y_q)``. This correction is ``w_q (X_q - Y_q)^T Y_F (Y_F^T Y_F)^-1``, with the
current w_q. With the factor U of the inverse, ``U^T U = H^-1``, the inverse on the columns after q is ``U_F^T U_F``. So
the rows of all q are one strictly upper triangular matrix times U.

The update for column q uses only the columns after it; their input errors follow in their own turns. Qronos solves for
all columns at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.rounding.solvers.gptq import ColumnSolver


class Gptaq(ColumnSolver):
    """GPTAQ with GPTQ's lazy updates.

    Without input errors, as in the model's first layers, its codes are exactly those of GPTQ.

    - `damp_percent`: the share of the mean second moment that is added to the diagonal. Default 0.01, as in GPTQ.
    - `alpha`: the share of the correction that is made. Default 0.25, as in the authors' code; 1 is the derivation.
    """

    name: Literal["gptaq"] = "gptaq"
    needs_original = True
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(act_order=True)]

    def damping(self, gram: Tensor) -> float:
        return self.damp_percent

    def corrected(self, weight: Tensor, input_error_cross: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight, (self.alpha * ((input_error_cross.double() @ factor.T).triu(1) @ factor)).float()
