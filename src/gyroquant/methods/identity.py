"""No change: a control that must give the unrotated codes bit for bit."""

from __future__ import annotations

from typing import Literal

from typing_extensions import Self

from gyroquant.maps import Identity as IdentityMap
from gyroquant.maps import Map
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site


class Identity(Method):
    """The identity map."""

    method: Literal["identity"] = "identity"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def choose(self, site: Site, context: Context) -> Map:
        return IdentityMap(site.n)
