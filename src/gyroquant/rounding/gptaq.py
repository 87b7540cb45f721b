"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ that also makes up for what rounding did to a layer's input.

X are the inputs of the unrounded model, Y those that the layer will see. When column q is rounded, GPTQ spreads the
error of q over the columns still free, F. GPTAQ adds to them the least-squares answer to the other half of what goes
missing there, ``w_q (X_q - Y_q)``: that is ``w_q (X_q - Y_q)^T Y_F (Y_F^T Y_F)^-1``, with w_q as it stands. With the
factor U of the inverse, ``U^T U = H^-1``, the inverse on the columns behind q is ``U_F^T U_F``, so the rows of all q
are one strictly upper triangle times U.

The update for column q knows of the columns behind it only, whose drift follows in their own turns; Qronos solves for
all columns at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from gyroquant.rounding.gptq import ColumnSolver


class Gptaq(ColumnSolver):
    """GPTAQ with GPTQ's lazy updates; `alpha` of the correction is made (1 is the derivation, the code has 0.25).

    Where nothing drifts, at the model's first layers for one, the result is that of GPTQ, code for code.
    """

    name: Literal["gptaq"] = "gptaq"
    needs_original = True
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25

    def damping(self, gram: Tensor) -> float:
        return self.damp_percent

    def corrected(self, weight: Tensor, drift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight, (self.alpha * ((drift.double() @ factor.T).triu(1) @ factor)).float()
