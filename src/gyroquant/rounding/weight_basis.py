"""The weight-basis form of BBT (arXiv 2605.25203). Weights are rounded in the basis of a Walsh-Hadamard transform of
their inputs, scaled by the energy of each coefficient. Decoding undoes scale and transform.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gyroquant.errors import MapError, RecipeError
from gyroquant.grids.basis import Basis, spectrum
from gyroquant.maps import next_power_of_two
from gyroquant.methods.spectral import scales


class WeightBasis(BaseModel):
    """Rounds ``pad(W) H diag(s)`` in place of W, with ``s = (1 + D rho)^alpha``.

    The transform of the input has D coefficients; rho is the share of the input's energy in each of them.

    - `padding`: ``exact`` (default) takes the Hadamard matrix of the layer's own order. ``pad`` adds zeros up to a
      power of two, as the paper does; then there are more codes than weights.
    - `alpha`: from 0 to 1, default 0.5. 0 is the transform without scales and needs no calibration.
    - `energy`: ``all`` (default) counts all coefficients, as in the paper's text. ``kept`` counts the first d, as in
      the authors' code, with s = 1 for the others. The two differ only with padding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    padding: Literal["exact", "pad"] = "exact"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    energy: Literal["all", "kept"] = "all"

    @property
    def needs_statistics(self) -> bool:
        """Whether the model must be run on calibration text."""
        return self.alpha > 0

    def order(self, columns: int, name: str = "a weight") -> int:
        """The number of columns that are rounded for a weight with `columns` columns.

        Raises RecipeError if there is no Hadamard matrix of that order.
        """
        order = columns if self.padding == "exact" else next_power_of_two(columns)
        try:
            Basis(columns, order).encode(torch.zeros(1, columns))
        except MapError as error:
            raise RecipeError(f"weights.basis: {error} ({name}); use weights.basis.padding=pad") from error
        return order

    def fit(self, columns: int, gram: Tensor | None) -> Basis:
        """The basis for an input with these second moments.

        Without second moments (no token reached an expert) all scales are 1.
        """
        order = self.order(columns)
        if gram is None or self.alpha == 0:
            return Basis(columns, order, None if self.alpha == 0 else torch.ones(1, order))
        energy = spectrum(gram.double(), order).diagonal().clamp_min(0)
        kept = columns if self.energy == "kept" else order
        scale, largest = torch.ones(1, order, dtype=torch.float64), torch.finfo(torch.float16).max
        if float(energy[:kept].sum()) > 0:
            scale[0, :kept] = scales(energy[:kept], self.alpha)
        return Basis(columns, order, scale.clamp_max(largest).half().float())
