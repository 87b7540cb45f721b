"""WUSH (arXiv 2512.00956): a map for each block of coordinates that balances inputs and weights, in closed form."""

from __future__ import annotations

from math import gcd
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.block_moments import WIDEST_BLOCK, BlockMoments
from gyroquant.errors import MapError, RecipeError
from gyroquant.maps import BlockDiagonal, Dense, Identity, Map, hadamard
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site, Structure


class Wush(Method):
    """Makes the second moments of inputs and of weights the same ones, and spreads them with a Hadamard matrix.

    For a block with second moments ``H = B^T B`` of its inputs and weights W, ``B W^T = U S V^T`` and
    ``M = B^-1 U S^(1/2) K`` with a Hadamard matrix K. Then ``M^T H M`` and ``M^-1 W^T W M^-T`` are both ``K^T S K``:
    what is large in the inputs is as large in the weights, and no coordinate is larger than the others.

    - `block`: the order of each map: the block of the format, 32 for MXFP4 and 16 for NVFP4. Default 32. It must
      divide the greatest common divisor of the site's order and 128.
    - `damp_percent`: this share of the mean is added to the diagonal of H and to S. Default 0.01.

    The maps are not orthogonal and run online.
    """

    method: Literal["wush"] = "wush"
    structure: ClassVar[Structure] = "any"
    statistics: ClassVar[tuple[Any, ...]] = (BlockMoments,)
    needs_weights: ClassVar[bool] = True
    sites: ClassVar[tuple[str, ...]] = ("linear", "attn_in", "mlp_in", "attn_out", "R4")
    block: Annotated[int, Field(ge=2, le=WIDEST_BLOCK)] = 32
    damp_percent: Annotated[float, Field(gt=0, le=1)] = 0.01

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(block=16), cls(block=4, damp_percent=0.1)]

    def check(self, site: Site, context: Context) -> None:
        if site.name not in self.sites:
            raise RecipeError(f"wush is for inputs of layers: {', '.join(self.sites)}, not for {site.name}")
        if gcd(site.n, WIDEST_BLOCK) % self.block:
            fits = [d for d in range(2, WIDEST_BLOCK + 1) if gcd(site.n, WIDEST_BLOCK) % d == 0]
            raise RecipeError(
                f"{site.label} has {site.n} coordinates: wush can have blocks of "
                f"{', '.join(map(str, fits)) or 'no size'}, not {self.block} (--set transform.{site.name}.block=SIZE)"
            )
        try:
            hadamard(self.block)
        except MapError as error:
            raise RecipeError(f"{site.label}: {error} (--set transform.{site.name}.block=SIZE)") from error

    def choose(self, site: Site, context: Context) -> Map:
        moments = context.statistics[BlockMoments].blocks(self.block)
        squares = torch.zeros_like(moments)
        for weight in context.weights():
            pieces = weight.reshape(-1, len(squares), self.block).double().to(squares.device)
            squares += torch.einsum("rbi,rbj->bij", pieces, pieces)
        spread = hadamard(self.block)
        parts = [self._part(h, w, spread) for h, w in zip(moments, squares, strict=True)]
        return BlockDiagonal(tuple(parts))

    def _part(self, moments: Tensor, squares: Tensor, spread: Map) -> Map:
        """The map of one block, from the second moments of its inputs and ``W^T W``."""
        mean = moments.diagonal().mean()
        if not (mean > 0 and squares.diagonal().mean() > 0):
            return Identity(self.block)  # nothing flows here
        upper = torch.linalg.cholesky(moments + self.damp_percent * mean * torch.eye(self.block).to(moments)).mT
        energy, axes = torch.linalg.eigh(upper @ squares @ upper.mT)
        sizes = energy.clamp_min(0).sqrt()
        sizes = sizes + self.damp_percent * sizes.mean()
        balanced = torch.linalg.solve_triangular(upper, axes * sizes.sqrt(), upper=True)
        return Dense(spread.apply(balanced))
