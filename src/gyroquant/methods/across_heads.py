"""QuaRot's Hadamard across heads (arXiv 2404.00456, section 4): with R2 inside every head, one over all of o_proj's
input.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from typing_extensions import Self

from gyroquant.errors import MapError, RecipeError
from gyroquant.maps import KroneckerLeft, Map, hadamard
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site


class AcrossHeads(Method):
    """A Hadamard matrix of as many rows as there are heads, applied to coordinate j of every head, for all j.

    It costs a fraction of a Hadamard map of the whole input and does the same together with one inside the heads.
    """

    method: Literal["across_heads"] = "across_heads"
    sites: ClassVar[tuple[str, ...]] = ("attn_out",)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def check(self, site: Site, context: Context) -> None:
        if site.name not in self.sites:
            raise RecipeError(f"across_heads mixes the heads before o_proj: it goes to attn_out, not to {site.name}")
        try:
            hadamard(site.heads)
        except MapError as error:
            raise RecipeError(
                f"{site.label}: across_heads needs a Hadamard matrix of order {site.heads}, the number of heads, and "
                "there is none; use --set transform.attn_out.method=hadamard, which mixes all coordinates"
            ) from error

    def choose(self, site: Site, context: Context) -> Map:
        self.check(site, context)
        return KroneckerLeft(hadamard(site.heads), site.n // site.heads)
