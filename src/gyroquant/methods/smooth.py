"""SmoothQuant (arXiv 2211.10438): moves a part of the magnitude of activations into the weights that read them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import Self

from gyroquant.calibration.observers import AbsMax
from gyroquant.maps import Diagonal, Map
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site, Structure


class Smooth(Method):
    """Divides channel j by ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``, W_j over all readers (equation 4).

    `alpha` is the part of the difficulty that moves to the weights: 0 none, 1 all. Default 0.5. A channel that is zero
    in the text or in every weight keeps its scale.
    """

    method: Literal["smooth"] = "smooth"
    structure: ClassVar[Structure] = "diagonal"
    statistics: ClassVar[tuple[Any, ...]] = (AbsMax,)
    needs_weights: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(alpha=0.25)]

    def choose(self, site: Site, context: Context) -> Map:
        x = context.statistics[AbsMax].value.double()
        w = torch.zeros(site.n)
        for weight in context.weights():
            w = torch.maximum(w, weight.abs().amax(0).view(-1, site.n).amax(0).cpu())
        s = x.pow(self.alpha) / w.double().pow(1 - self.alpha)
        return Diagonal(torch.where((x > 0) & (w > 0), 1 / s, torch.ones_like(s)))
