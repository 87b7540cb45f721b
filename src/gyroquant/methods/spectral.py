"""Scales, absorbed in norms, that make channels of high energy larger in the weights and smaller in the activations.

The `no_rotation` mode of BBT (arXiv 2605.25203): ``s = (1 + n rho)^alpha`` where rho is the share of the energy.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import MeanSquare, PaddedSpectrum
from gyroquant.maps import Diagonal, Identity, Map
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site, Structure


class SpectralScale(Method):
    """Divides channels by ``(1 + n rho)^alpha`` and multiplies the columns that read them.

    `energy` states which mean squares rho is a share of:

    - ``corrected`` (default): the mean squares of the channels themselves.
    - ``paper``: those of the first n Walsh-Hadamard coefficients, as in the authors' code. Channel j takes the share of
      coefficient j. The two are unrelated, so ``paper`` is for comparison only.
    """

    method: Literal["spectral_scale"] = "spectral_scale"
    structure: ClassVar[Structure] = "diagonal"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    energy: Literal["corrected", "paper"] = "corrected"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(energy="paper", alpha=0.25)]

    @property
    def statistics(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (MeanSquare if self.energy == "corrected" else PaddedSpectrum,)

    def choose(self, site: Site, context: Context) -> Map:
        energy = context.statistics[self.statistics[0]].value[: site.n]
        return Diagonal(1 / scales(energy, self.alpha)) if float(energy.sum()) > 0 else Identity(site.n)


def scales(energy: Tensor, alpha: float) -> Tensor:
    """``(1 + n rho)^alpha``, shape (n,): sqrt(2) everywhere for a flat spectrum and alpha one half."""
    rho = energy.double() / energy.double().sum()
    return (1 + energy.numel() * rho) ** alpha
