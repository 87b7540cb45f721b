"""QuaRot's Hadamard across heads (arXiv 2404.00456, section 4). Together with R2, it rotates all of o_proj's input."""

from __future__ import annotations

from typing import ClassVar, Literal

from typing_extensions import Self

from gyroquant.errors import MapError, RecipeError
from gyroquant.maps import KroneckerLeft, Map, hadamard
from gyroquant.methods.base import Context, Method
from gyroquant.models.graph.sites import Site


class AcrossHeads(Method):
    """A Hadamard matrix whose order is the number of heads, applied to coordinate j of all heads, for every j.

    It costs a fraction of a Hadamard map of the whole input. Together with a Hadamard map in each head it does the
    same.
    """

    method: Literal["across_heads"] = "across_heads"
    sites: ClassVar[tuple[str, ...]] = ("attn_out",)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]

    def check(self, site: Site, context: Context) -> None:
        if site.name not in self.sites:
            raise RecipeError(f"across_heads mixes the heads before o_proj: use it at attn_out, not at {site.name}")
        try:
            hadamard(site.heads)
        except MapError as error:
            raise RecipeError(
                f"{site.label}: across_heads needs a Hadamard matrix of order {site.heads}, the number of heads, but "
                "there is none; use --set transform.attn_out.method=hadamard, which mixes all coordinates"
            ) from error

    def choose(self, site: Site, context: Context) -> Map:
        self.check(site, context)
        return KroneckerLeft(hadamard(site.heads), site.n // site.heads)
