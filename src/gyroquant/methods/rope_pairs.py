"""Rotations of queries and keys before RoPE that align the rows of their projections with the projections' outputs.

The pair-PCA of BBT (arXiv 2605.25203). docs/methods/bbt.md explains it section by section.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import SecondMoments
from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Map, PairRotation
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.rope import Rope
from gyroquant.models.graph.sites import Site, Structure


class PairPCA(Method):
    """One rotation for each pair that RoPE rotates: the principal axes of the pair's second moments, not centred.

    The outputs of key heads are measured. Query heads take the rotation of the key head that they share. Coordinates
    that RoPE does not rotate do not change.
    """

    method: Literal["pair_pca"] = "pair_pca"
    structure: ClassVar[Structure] = "pairs"
    statistics: ClassVar[tuple[Any, ...]] = (SecondMoments,)
    sites: ClassVar[tuple[str, ...]] = ("qk",)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def check(self, site: Site, context: Context) -> None:
        _pairs_of(site)

    def choose(self, site: Site, context: Context) -> Map:
        rope = _pairs_of(site)
        gram = context.statistics[SecondMoments].second_moments.double().cpu()
        return PairRotation(site.n, principal_angles(gram, rope), rope.interleaved)


def _pairs_of(site: Site) -> Rope:
    if site.rope is None:
        missing = "no RoPE after it" if site.name == "qk" else "no pairs that RoPE rotates"
        raise UnsupportedModelError(f"{site.label} has {missing}: use pair_pca at qk of models with RoPE")
    return site.rope


def principal_angles(gram: Tensor, rope: Rope) -> Tensor:
    """The angles, within half a turn, that make the second moments of every pair diagonal, the larger one first.

    `gram` has shape (n, n); the result has shape (pairs,). The rotation is proper (determinant +1) by construction. An
    eigenvector basis with determinant -1 is such a rotation with one axis reversed.
    """
    index = torch.arange(gram.shape[0])
    first, second = PairRotation(gram.shape[0], torch.zeros(rope.pairs), rope.interleaved).split(index)
    cross, difference = gram[first, second], gram[first, first] - gram[second, second]
    return -0.5 * torch.atan2(2 * cross, difference)
