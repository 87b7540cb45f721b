"""Rotations for the KV cache from the statistics of attention: OSCAR (arXiv 2605.17757), and the axes of keys."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.attention_observers import KeyMoments, QueryMoments, ValueMoments
from gyroquant.errors import MapError, RecipeError
from gyroquant.maps import BlockDiagonal, Dense, Identity, Map, hadamard
from gyroquant.methods.base import Context, Method
from gyroquant.methods.pca import principal_axes
from gyroquant.models.graph.sites import Site


class _HeadAxes(Method):
    """A method that turns heads into principal axes of a second moment."""

    @abstractmethod
    def _moments(self, site: Site, context: Context) -> Tensor | None:
        """Shape (maps, n, n): one for each kv head, or a single one for all. None if nothing was seen."""

    def _turned(self, axes: Map) -> Map:
        return axes

    def check(self, site: Site, context: Context) -> None:
        if site.name not in self.sites:
            raise RecipeError(
                f"{self.method} turns the heads of attention: use it at {' or '.join(self.sites)}, not at {site.name}"
            )

    def choose(self, site: Site, context: Context) -> Map:
        self.check(site, context)
        moments = self._moments(site, context)
        if moments is None:
            return Identity(site.n)
        maps = [self._turned(Dense(principal_axes(one.double()))) for one in moments]
        return maps[0] if len(maps) == 1 else BlockDiagonal(tuple(maps))


class Oscar(_HeadAxes):
    """The principal axes of what rounding errors cost, then a Hadamard matrix that spreads them over the coordinates.

    - At R3, of the queries that share a kv head: an error of a key costs its products with them. Queries and keys are
      turned after RoPE. With `per_head` (default true) every kv head has its own rotation. false: all heads of a layer
      share that of the mean.
    - At R2, of the values, weighted by how much their tokens' keys excite the queries. All heads share it, and it is
      absorbed by v_proj and o_proj.

    The paper's permutation after the Hadamard matrix is left out: it changes nothing where a head is one group, as in
    the KV cache of this package by default.
    """

    method: Literal["oscar"] = "oscar"
    statistics: ClassVar[tuple[Any, ...]] = (QueryMoments, ValueMoments)
    sites: ClassVar[tuple[str, ...]] = ("R2", "R3")
    per_head: bool = True

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(per_head=False)]

    def check(self, site: Site, context: Context) -> None:
        super().check(site, context)
        try:
            hadamard(site.n)
        except MapError as error:
            raise RecipeError(
                f"{site.label}: oscar needs a Hadamard matrix of order {site.n}, the size of a head, and there is "
                "none: take head_pca at R2 and key_pca at R3"
            ) from error

    def _moments(self, site: Site, context: Context) -> Tensor | None:
        observer = context.statistics[QueryMoments if site.name == "R3" else ValueMoments]
        if not observer.count:
            return None
        sums: Tensor = observer.sums
        return sums if self.per_head and site.name == "R3" else sums.mean(0, keepdim=True)

    def _turned(self, axes: Map) -> Map:
        return axes @ hadamard(axes.n)


class KeyPCA(_HeadAxes):
    """The principal axes of the keys of a kv head after RoPE, around their mean, by descending variance.

    The rotation of RotateK, without its pruning of channels. `per_head` (default true): every kv head has its own. A
    key then has few large coordinates, so it is for grids with small groups.
    """

    method: Literal["key_pca"] = "key_pca"
    statistics: ClassVar[tuple[Any, ...]] = (KeyMoments,)
    sites: ClassVar[tuple[str, ...]] = ("R3",)
    per_head: bool = True

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(per_head=False)]

    def _moments(self, site: Site, context: Context) -> Tensor | None:
        observer = context.statistics[KeyMoments]
        if not observer.count:
            return None
        covariance: Tensor = observer.covariance
        return covariance if self.per_head else covariance.mean(0, keepdim=True)
