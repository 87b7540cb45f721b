"""Principal axes of heads: the basis into which the matrix gain of BBT (arXiv 2605.25203) rotates queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import SecondMoments
from gyroquant.errors import RecipeError
from gyroquant.maps import Dense, Identity, Map
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site


class HeadPCA(Method):
    """The eigenvectors of the second moments of a head, not centred, by descending eigenvalue.

    At `qk` it runs online: the head is rotated back after the projections, so that norms and RoPE get their usual
    input. Before a norm over heads, this equals the matrix gain ``diag(gamma) U``, because a rotation keeps the norm.
    """

    method: Literal["head_pca"] = "head_pca"
    statistics: ClassVar[tuple[Any, ...]] = (SecondMoments,)
    sites: ClassVar[tuple[str, ...]] = ("R2", "qk")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def check(self, site: Site, context: Context) -> None:
        if site.name not in self.sites:
            raise RecipeError(
                f"head_pca uses the second moments of heads: use it at {' or '.join(self.sites)}, not at {site.name}"
            )

    def choose(self, site: Site, context: Context) -> Map:
        self.check(site, context)
        observer = context.statistics[SecondMoments]
        return Dense(principal_axes(observer.second_moments.double().cpu())) if observer.count else Identity(site.n)


def principal_axes(gram: Tensor) -> Tensor:
    """Eigenvectors as columns, largest eigenvalue first, the largest entry of each positive; shape (n, n)."""
    axes = torch.linalg.eigh(gram).eigenvectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)
