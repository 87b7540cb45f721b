"""The contract of methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import gyroquant as gq
from gyroquant.errors import GyroquantError, ProofError, UnsupportedModelError
from gyroquant.grids import IntegerGrid
from gyroquant.maps import Map
from gyroquant.methods import Context, Method
from gyroquant.models.folding.prove import Proof
from gyroquant.models.graph.sites import Site, Structure, find_sites
from gyroquant.models.stores.source import open_model
from gyroquant.testing.contract import Contract, require
from gyroquant.testing.models import amount, tiny_model, tokens

CONTEXT = Context(seed=7, group_size=32, grid=IntegerGrid(group_size=32))
SITES = ("R1", "R2", "attn_out", "qk", "R3", "R4", "attn_in", "mlp_in")
METHOD: Contract[Method] = Contract("method", Method, str)


def choose_on_random(method: Method, site: Site, context: Context = CONTEXT) -> Map:
    """The map that a method chooses for a site with random vectors and weights.

    The channels have very different sizes. The method gets the statistics and weights that it declares.
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


@cache
def _sites(name: str, structure: Structure) -> tuple[Site, ...]:
    """The sites with this name in a tiny Llama, for maps of a structure."""
    return tuple(find_sites(open_model(tiny_model()).graph, name, structure=structure))


def _cases(method: Method) -> Iterator[Site]:
    """Every site that a method supports."""
    for name in method.sites or SITES:
        yield from _sites(name, method.structure)


def _first(method: Method) -> Site:
    return next(_cases(method))


@METHOD.check()
def check_its_observers_say_how_large_they_are(method: Method) -> None:
    """Observers state their memory, which a run needs before it starts."""
    for observer in method.statistics:
        size = getattr(observer, "size_in_bytes", None)
        require(size is not None, f"{observer} does not state its memory. Define size_in_bytes")
        require(size(64) > 0, f"{observer} states that it needs no memory. Correct size_in_bytes")  # type: ignore[misc]


@METHOD.check()
def check_maps_fit_their_sites_and_are_what_they_say(method: Method) -> None:
    """Maps have the order of their site and the declared `structure`."""
    for site in _cases(method):
        _check_map(method, site, CONTEXT)


def _check_map(method: Method, site: Site, context: Context) -> None:
    chosen, structure = choose_on_random(method, site, context), method.structure
    require(chosen.n == site.n, f"at {site.label} its map has order {chosen.n}, but the site has order {site.n}")
    for declared, holds in (
        ("orthogonal", chosen.orthogonal or structure in ("any", "diagonal")),
        ("permutation", chosen.is_permutation or structure != "permutation"),
        ("diagonal", chosen.diagonal or structure != "diagonal"),
    ):
        require(holds, f"at {site.label} its map is not {declared}. Choose such a map, or declare another structure")
    eye = torch.eye(site.n, dtype=torch.float64)
    close = torch.allclose(chosen.dense() @ chosen.inverse().dense(), eye, atol=1e-9)
    require(close, f"at {site.label} inverse() of its map is not the inverse")


@METHOD.check(when=lambda method: bool(method.sites))
def check_other_sites_are_refused(method: Method) -> None:
    """A method that declares `sites` refuses all others, before anything is measured."""
    for name in set(SITES) - set(method.sites):
        site = _sites(name, method.structure)[0]
        try:
            choose_on_random(method, site)
        except GyroquantError:
            continue
        raise AssertionError(f"it is for {', '.join(method.sites)} and takes {name}. Refuse it in check, or declare it")


@METHOD.check()
def check_the_seed_decides_where_it_is_random(method: Method) -> None:
    """The same seed gives the same map. Another seed gives another map exactly if `random` is true."""
    _check_seed(method, _first(method), CONTEXT)


def _check_seed(method: Method, site: Site, context: Context) -> None:
    chosen, again = (choose_on_random(method, site, context).dense() for _ in range(2))
    require(torch.equal(chosen, again), "the same seed gives another map. Draw from context.generator(site) only")
    other = choose_on_random(method, site, replace(context, seed=context.seed + 1)).dense()
    same = torch.equal(chosen, other)
    require(same or method.random, "another seed gives another map. A random method has to declare it: set random")
    require(not (same and method.random), "it declares that it is random, but another seed gives the same map")


@METHOD.check()
def check_folding_it_is_exact(method: Method) -> None:
    """Folding does not change the function of models with and without a norm's bias, with experts, and without RoPE.

    Statistics are measured on the model itself. Maps that cannot be fused run online. Sites that a model does not
    support are left out.
    """
    used = set()
    for name in ("llama", "qwen2_moe", "gpt2"):
        for site in method.sites or SITES:
            try:
                proof = _proof(name, site, method)
            except ProofError as error:
                raise AssertionError(f"folded into {site} of a tiny {name} it changes the model: {error}") from error
            if proof is None:
                continue
            used.add(site)
            worst = max(proof.relative_logit_error, proof.worst_block_error)
            require(worst < 1e-5, f"folded into {site} of a tiny {name} it changes the model by {worst:.1g}")
    missing = set(method.sites) - used
    require(not missing, f"no model takes it at {', '.join(missing)}. Declare the sites that it supports")
    require(bool(used), "no model takes it at any site. Declare its structure")


def _proof(name: str, site: str, method: Method) -> Proof | None:
    """The proof of a method's maps at a site of a tiny model: fused, or online. None if the site takes neither."""
    for online in (None, True):
        step = method.model_dump() | {"online": online}
        changes = [f"transform.{site}={json.dumps(step)}", "weights.group_size=16", *amount()]
        model = tiny_model(name)
        with suppress(UnsupportedModelError):
            return gq.transform(model, gq.load_recipe("rtn", changes), tokens(model))
    return None


def check_method(
    method: Method | type[Method], site: Site | None = None, context: Context = CONTEXT, *, fold: bool = True
) -> None:
    """Runs all checks of a method, or of every example of a class of methods.

    Maps must fit their sites and have the declared `structure`. The seed must decide if the method is `random`. Weights
    may be read only if the method declares `needs_weights`. Observers must state their size, and folding must be exact.
    `site`: check the map at this site only. `fold`: also fold maps into tiny models. Default: true. Raises
    AssertionError, which names the class, what is wrong and what to do.
    """
    if site is None:
        for instance in METHOD.instances(method):
            for check in METHOD.checks_of(instance):
                if fold or check is not check_folding_it_is_exact:
                    check(instance)
        return
    for instance in METHOD.instances(method):
        check_its_observers_say_how_large_they_are(instance)
        try:
            _check_map(instance, site, context)
            _check_seed(instance, site, context)
        except (AssertionError, GyroquantError) as error:
            raise AssertionError(f"{METHOD.label(instance)}: {error}") from error
