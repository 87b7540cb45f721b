"""The contracts of extensions as checks that anybody runs on classes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import RecipeError
from gyroquant.grids import IntegerGrid
from gyroquant.maps import Map
from gyroquant.methods import Context, Method
from gyroquant.models.sites import Site

CONTEXT = Context(seed=7, group_size=32, grid=IntegerGrid(group_size=32))


def choose_on_random(method: Method, site: Site, context: Context = CONTEXT) -> Map:
    """The map that a method chooses for a site whose vectors and weights are random, with channels of very different
    size. It gets statistics and weights as it says that it needs them.
    """
    generator = torch.Generator().manual_seed(site.n)
    seen: dict[Any, Any] = {kind: kind(site.n) for kind in method.statistics}
    vectors = torch.randn(200, site.n, generator=generator) * torch.rand(site.n, generator=generator).exp()
    for observer in seen.values():
        observer(vectors)

    def weights() -> Iterator[Tensor]:
        again = torch.Generator().manual_seed(site.n)
        yield from (torch.randn(24, width * site.n, generator=again) for width in (2, 4))

    if method.needs_weights:
        context = replace(context, weights=weights)
    method.check(site, context)
    return method.choose(site, replace(context, statistics=seen))


def check_method(method: Method, site: Site, context: Context = CONTEXT) -> None:
    """Checks what a method says of itself on a site that it is meant for: an orthogonal map that is what `structure`
    says, the same for the same seed, another one for another seed where it is `random` and only there, weights read
    only where it says so, observers that know their size. Raises AssertionError with what is wrong.
    """
    name = method.method
    for observer in method.statistics:
        size = getattr(observer, "size_in_bytes", None)
        assert size is not None, f"{name}: an observer does not say how much memory it takes (size_in_bytes)"
        assert size(site.n) > 0, f"{name}: an observer takes no memory"
    try:
        chosen = choose_on_random(method, site, context)
    except RecipeError as error:
        raise AssertionError(f"{name}: {error}") from error
    assert chosen.n == site.n, f"{name}: the map has order {chosen.n}, the site {site.n}"
    assert chosen.orthogonal or method.structure in ("any", "diagonal"), f"{name}: the map is not orthogonal"
    assert chosen.permuting or method.structure != "permutation", f"{name}: the map is no permutation"
    assert chosen.diagonal or method.structure != "diagonal", f"{name}: the map is not diagonal"
    eye = torch.eye(site.n, dtype=torch.float64)
    assert torch.allclose(chosen.dense() @ chosen.inverse().dense(), eye, atol=1e-9), f"{name}: inverse() is none"
    again = choose_on_random(method, site, context).dense()
    assert torch.equal(chosen.dense(), again), f"{name}: the same seed gives another map"
    other = choose_on_random(method, site, replace(context, seed=context.seed + 1)).dense()
    same = torch.equal(chosen.dense(), other)
    assert same or method.random, f"{name}: another seed gives another map, so it is random and has to say so"
    assert not (same and method.random), f"{name} says that it is random, and another seed gives the same map"
