"""AWQ's scales (arXiv 2306.00978): channels with large activations get more of the weights' grid."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import MeanAbs, MeanSquare
from gyroquant.errors import RecipeError
from gyroquant.grids import Grid
from gyroquant.maps import Diagonal, Identity, Map
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site, Structure

_PIECE = 1 << 22  # weights that are rounded at once
_FLOOR = 1e-4  # of the largest channel: a channel that is zero in the text must not set the range of the scales


class Awq(Method):
    """Multiplies column j of the weights by ``s_j = mean|x_j|^a``, with the a of least rounding error (section 3.2).

    The exponents tried are 0, 1/steps, ... below 1, as in the paper's code; 0 is no scaling. The error of an exponent
    is that of rounding to nearest on the weights' own grid, ``sum_j E[x_j^2] |(W - Q(W s) / s)_j|^2`` over all readers:
    the output error without the correlations between channels.

    `steps`: number of exponents. Default 20.
    `scales`: how the grid's scales are fitted. `minmax` (default) takes the range of a group, as the paper does.
    `recipe` fits them as the recipe states; with `mse` that is forty times slower.
    """

    method: Literal["awq"] = "awq"
    structure: ClassVar[Structure] = "diagonal"
    statistics: ClassVar[tuple[Any, ...]] = (MeanAbs, MeanSquare)
    needs_weights: ClassVar[bool] = True
    steps: Annotated[int, Field(ge=2, le=100)] = 20
    scales: Literal["minmax", "recipe"] = "minmax"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(steps=4), cls(steps=2, scales="recipe")]

    def check(self, site: Site, context: Context) -> None:
        if context.grid.tile_rows > 1:
            raise RecipeError(f"awq rounds weights one by one, and the grid {context.grid.grid} codes rows together")
        if context.grid.has_codebooks:
            raise RecipeError(
                f"awq scales the weights, and the grid {context.grid.grid} has codebooks for each of them"
            )

    def choose(self, site: Site, context: Context) -> Map:
        mean, power = (context.statistics[kind].value for kind in (MeanAbs, MeanSquare))
        grid = context.grid.fitted_by("minmax") if self.scales == "minmax" else context.grid
        candidates = [scales(mean, step / self.steps) for step in range(self.steps)]
        errors = torch.zeros(self.steps, dtype=torch.float64)
        for weight in context.weights():
            own = grid.for_columns(weight.shape[1])
            own.group_of(weight.shape[1], f"the weights that read {site.label}")
            for piece in weight.split(max(1, _PIECE // weight.shape[1])):
                errors += torch.stack([rounding_error(piece, s, power, own) for s in candidates])
        best = int(errors.argmin())  # the first of equals, which scales least
        return Diagonal(1 / candidates[best]) if best else Identity(site.n)


def scales(mean: Tensor, exponent: float) -> Tensor:
    """``mean^exponent``, divided by the root of the product of its largest and smallest value; shape (n,), fp64."""
    s = mean.double().clamp_min(max(_FLOOR * float(mean.max()), 1e-30)).pow(exponent)
    return s / (s.max() * s.min()).sqrt()


def rounding_error(weight: Tensor, s: Tensor, power: Tensor, grid: Grid) -> Tensor:
    """``sum_j power_j |(W - Q(W s) / s)_j|^2``, fp64, for W of shape (rows, k n); s and power are repeated k times."""
    times = weight.shape[1] // s.numel()
    s, power = s.repeat(times).to(weight), power.repeat(times).to(weight)
    difference = grid.fake(weight * s) / s - weight
    return (difference.square() * power).sum(dtype=torch.float64).cpu()
