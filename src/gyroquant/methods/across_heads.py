"""QuaRot's Hadamard across heads (arXiv 2404.00456, section 4): with R2 inside every head, one over all of o_proj's
input.
"""

from __future__ import annotations

from typing import Literal

from gyroquant.errors import MapError, RecipeError
from gyroquant.maps import Across, Map, hadamard
from gyroquant.methods.base import Context, Method
from gyroquant.models.sites import Site


class AcrossHeads(Method):
    """A Hadamard matrix of as many rows as there are heads, applied to coordinate j of every head, for all j.

    It costs a fraction of a Hadamard map of the whole input and does the same together with one inside the heads.
    """

    method: Literal["across_heads"] = "across_heads"

    def check(self, site: Site, context: Context) -> None:
        if site.name != "attn_out":
            raise RecipeError(f"across_heads mixes the heads in front of o_proj: it goes to attn_out, not {site.name}")
        try:
            hadamard(site.heads)
        except MapError as error:
            raise RecipeError(
                f"{site.label}: across_heads needs a Hadamard matrix of order {site.heads}, the number of heads, and "
                "there is none; use --set transform.attn_out.method=hadamard, which mixes all coordinates"
            ) from error

    def choose(self, site: Site, context: Context) -> Map:
        self.check(site, context)
        return Across(hadamard(site.heads), site.n // site.heads)
