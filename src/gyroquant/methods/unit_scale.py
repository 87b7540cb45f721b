"""Scales of one. They change nothing and are the initial values of learned scales (OSTQuant, arXiv 2501.13987)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from typing_extensions import Self

from gyroquant.maps import Diagonal, Map
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site, Structure


class UnitScale(Method):
    """A factor of one for every coordinate."""

    method: Literal["unit_scale"] = "unit_scale"
    structure: ClassVar[Structure] = "diagonal"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def choose(self, site: Site, context: Context) -> Map:
        return Diagonal(torch.ones(site.n, dtype=torch.float64))
