"""What a rounded layer is asked to be: its weights, or those that undo what rounding did to its input.

With X the inputs of the unrounded model and Y those that the layer will see, ``|X W^T - Y Q^T|^2`` is, but for a
constant, ``|Y (W* - Q)^T|^2`` for the least-squares answer ``W* = W + W (X - Y)^T Y H^-1``, ``H = Y^T Y``. So any
solver can be asked for W* instead of W. All of the way overfits the calibration text; this goes a share of it (CoreQ,
arXiv 2602.05902, has the idea of a share for each layer in closed form; the formula here is our own).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gyroquant.rounding.base import InputStatistics, Warn
from gyroquant.rounding.factor import inverse_factor

_ROWS = 1024


class Target(BaseModel):
    """How far a layer's weights are moved towards W* before they are rounded.

    `share` is between 0 and 1, or `auto`: the share of the layer's drifted output, ``|(X - Y) W^T|^2``, that any
    weights on the drifted input can give back, as `determination` computes it. What cannot be given back is noise to
    the layer, and a fit to it does not hold on other text. `damp_percent` is that of GPTQ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    share: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01

    def shifted(self, weight: Tensor, statistics: InputStatistics, warn: Warn) -> tuple[Tensor, InputStatistics]:
        """The weights to round, shape (out, in), fp32, and the statistics to round them by, without a drift.

        Where nothing drifts, or nothing could be paired, they are the weights that there are.
        """
        plain = InputStatistics(statistics.gram, statistics.count)
        if statistics.drift is None or statistics.spread is None:
            return weight, plain
        factor = inverse_factor(statistics.gram, self.damp_percent, warn)
        drift, spread = statistics.drift.double(), statistics.spread.double()
        changes, explained, all_of_it = [], 0.0, 0.0
        for part in weight.split(_ROWS):
            w = part.double()
            slope = w @ drift
            change = slope @ factor.T @ factor
            changes.append(change.float())
            explained += float((change * slope).sum())
            all_of_it += float(((w @ spread) * w).sum())
        share = determination(explained, all_of_it) if self.share == "auto" else self.share
        return weight + share * torch.cat(changes), plain


def determination(explained: float, all_of_it: float) -> float:
    """The share of a drift's energy that was explained, between 0 and 1; 0 where nothing drifted."""
    return min(1.0, max(0.0, explained / all_of_it)) if all_of_it > 0 else 0.0
