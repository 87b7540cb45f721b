"""The state of a run: the results of its stages so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.pipeline.kronecker import KeptFactors


@dataclass
class RunState:
    """The data that the stages of one run pass on. Only stages write here; the docstring of each names what it writes.

    - ``plan``: the maps to fold. At first it has placeholders for measured maps; `measure` and `learn` replace it.
    - ``grids``: the grid of each layer to round, by the name of its weight. `allocate` replaces some.
    - ``row_places``: for layers whose rows have bits of their own, the place of each row's width among those it may
      have, int64 of shape (out,), by the name of the layer's weight. `allocate` writes them.
    - ``quantizers``: the quantizers that run with the model. `quantize` adds the measured means of keys.
    - ``token_weights``: the weights of calibration tokens, shape (groups, tokens), by the name of a layer's weight.
      `guide` writes them.
    - ``kronecker``: the factors of `guided.kronecker`, if the recipe has it. `guide` writes them.
    - ``tokens``: the calibration windows, shape (samples, length), if they are not those of the spec. `windows` writes
      them.
    - ``external_codes``: the layers that an external solver has rounded, by the name of the weight.
    - ``warnings``: texts for the user, shown at the end and kept in the manifest.
    - ``results``: plain data for the manifest, by its key there.
    """

    plan: FoldPlan
    grids: dict[str, Grid]
    quantizers: list[OnlineOp]
    row_places: dict[str, Tensor] = field(default_factory=dict)
    token_weights: dict[str, Tensor] = field(default_factory=dict)
    kronecker: KeptFactors | None = None
    tokens: Tensor | None = None
    external_codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
