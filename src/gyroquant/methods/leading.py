"""Principal directions first: ResQ (arXiv 2412.14363), and with the weights CoQuant (arXiv 2604.26378)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import SecondMoments
from gyroquant.errors import MapError, RecipeError
from gyroquant.grids import LeadingOrder, leading_columns
from gyroquant.maps import BlockDiagonal, Dense, Identity, Map, hadamard, random_orthogonal, random_signs
from gyroquant.methods.base import Context, Method, block_size
from gyroquant.methods.pca import principal_axes
from gyroquant.models.graph.sites import Site


class Leading(Method):
    """Rotates a site so that its first coordinates hold its principal directions, for the grid `leading`.

    With second moments H of the vectors and weights W that read them, the directions are the eigenvectors of
    ``H / tr H + W^T W / tr W^T W``, the largest first (CoQuant: an error of the vectors meets the weights, and one of
    the weights the vectors). The leading ones are then rotated among themselves, and the others too, by a Hadamard
    matrix with random signs, or by a random rotation where there is no such matrix. So no coordinate of either part is
    larger than the others.

    - `share`: the share of leading directions, to the nearest multiple of 8. Default 0.125. The grid takes it over.
    - `weights`: false leaves the weights out of the sum, as ResQ does. Default true.
    - `block`: the order of each map; every block has its own leading directions. Default full. CoQuant takes 256 at
      down_proj (R4).
    """

    method: Literal["leading"] = "leading"
    statistics: ClassVar[tuple[Any, ...]] = (SecondMoments,)
    needs_weights: ClassVar[bool] = True
    sites: ClassVar[tuple[str, ...]] = ("R1", "R2", "R4")
    share: Annotated[float, Field(gt=0, lt=1)] = 0.125
    weights: bool = True
    block: Annotated[int, Field(ge=16)] | Literal["full"] = "full"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(share=0.5, weights=False, block=16)]

    @property
    def random(self) -> bool:
        return True

    def check(self, site: Site, context: Context) -> None:
        if site.name not in self.sites:
            raise RecipeError(f"leading is for {', '.join(self.sites)}, not for {site.name}")
        leading_columns(block_size(self.block, site, context), self.share)

    def order(self, site: Site) -> LeadingOrder:
        """Where the leading directions of a site are."""
        return LeadingOrder(self.block if isinstance(self.block, int) else site.n, self.share)

    def choose(self, site: Site, context: Context) -> Map:
        self.check(site, context)
        observer = context.statistics[SecondMoments]
        if not observer.count:
            return Identity(site.n)
        gram = _normed(observer.second_moments.double().cpu())
        if self.weights:
            gram = gram + _normed(_squares(site.n, context))
        size, generator = block_size(self.block, site, context), context.generator(site)
        leading = leading_columns(size, self.share)
        maps: list[Map] = []
        for start in range(0, site.n, size):
            axes = principal_axes(gram[start : start + size, start : start + size])
            parts = _spread(leading, generator).dense(), _spread(size - leading, generator).dense()
            maps.append(Dense(axes @ torch.block_diag(*parts)))
        return maps[0] if len(maps) == 1 else BlockDiagonal(tuple(maps))


def _normed(gram: Tensor) -> Tensor:
    """A matrix divided by its trace."""
    return gram / gram.diagonal().sum().clamp_min(1e-30)


def _squares(n: int, context: Context) -> Tensor:
    """The sum of ``W^T W`` over the weights that read a site of n coordinates, fp64."""
    total = torch.zeros(n, n, dtype=torch.float64)
    for weight in context.weights():
        rows = weight.reshape(-1, n)
        total += (rows.T @ rows).double().cpu()
    return total


def _spread(n: int, generator: torch.Generator) -> Map:
    """A randomised Hadamard map of order n, or a random rotation where there is none."""
    try:
        return random_signs(n, generator) @ hadamard(n)
    except MapError:
        return random_orthogonal(n, generator)
