"""The target of a solver: a layer's own weights, or weights that correct the input error of the layer.

X are the layer's inputs in the unrounded model, Y those in the rounded model. Up to a constant, ``|X W^T - Y Q^T|^2``
is ``|Y (W* - Q)^T|^2`` for the least-squares solution ``W* = W + W (X - Y)^T Y H^-1``, ``H = Y^T Y``. So any solver can
round W* instead of W. The full change overfits the calibration text, so only a share of it is made. The idea of a
closed-form share for each layer is from CoreQ (arXiv 2602.05902); the formula here is our own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.rounding.base import InputStatistics, PreparedWeight, Solver, Warn, When
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.steps.base import LayerStep

_ROWS = 1024


class Target(LayerStep):
    """Moves a layer's weights towards W* before the solver rounds them.

    - `share`: how far, from 0 to 1, or `auto` (default). `auto` is the share of the error in the layer's output,
      ``|(X - Y) W^T|^2``, that a linear map of Y can explain, as `determination` computes it. The rest is noise for the
      layer, and a fit to it does not help on other text.
    - `damp_percent`: the share of the mean second moment that is added to the diagonal. Default 0.01, as in GPTQ.
    """

    key = "target"
    when = When.BEFORE_SOLVER
    needs_statistics = True
    needs_original = True
    needs_input_error_second_moments = True

    share: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(share=0.5)]

    def conflicts(self, solver: Solver) -> str:
        if not solver.needs_original:
            return ""
        return f"the solver {solver.name} corrects the input error by itself: leave target out, or take gptq"

    def apply(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        assert prepared.statistics is not None
        matrix, statistics = self.shifted(prepared.matrix, prepared.statistics, warn)
        changed = prepared.statistics.input_error_cross is not None
        return replace(prepared, matrix=matrix, statistics=statistics, corrects_input_error=changed)

    def shifted(self, weight: Tensor, statistics: InputStatistics, warn: Warn) -> tuple[Tensor, InputStatistics]:
        """The weights to round, shape (out, in), fp32, and statistics for the solver, without an input error.

        Without an input error, or if no tokens could be paired, the weights do not change.
        """
        plain = replace(statistics, input_error_cross=None, input_error_second_moments=None)
        if statistics.input_error_cross is None or statistics.input_error_second_moments is None:
            return weight, plain
        factor = inverse_factor(statistics.second_moments, self.damp_percent, warn)
        changes, explained, energy = [], 0.0, 0.0
        for w in weight.split(_ROWS):
            slope = (w @ statistics.input_error_cross.to(w)).double()
            change = slope @ factor.T @ factor
            changes.append(change.float())
            explained += float((change * slope).sum())
            energy += float(((w @ statistics.input_error_second_moments.to(w)) * w).sum(dtype=torch.float64))
        share = determination(explained, energy) if self.share == "auto" else self.share
        return weight + share * torch.cat(changes), plain


def determination(explained: float, energy: float) -> float:
    """The explained share of an error's energy, between 0 and 1; 0 if there is no error."""
    return min(1.0, max(0.0, explained / energy)) if energy > 0 else 0.0
