"""The contract of descriptions of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gyroquant import maps
from gyroquant.errors import ProofError, UnsupportedModelError
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import SITE_NAMES, Site, find_sites
from gyroquant.models.graph.spec import Architecture, Example
from gyroquant.models.stores.source import open_model
from gyroquant.testing.contract import Contract, require
from gyroquant.testing.models import tiny_config, tiny_model, tokens

_TOLERANCE = 5e-6


@dataclass(frozen=True)
class TinyArchitecture:
    """A description with one of its tiny models, by name."""

    architecture: Architecture
    name: str

    @property
    def example(self) -> Example:
        """How the tiny model is made."""
        return self.architecture.examples[self.name]


ARCHITECTURE: Contract[TinyArchitecture] = Contract("architecture", TinyArchitecture, lambda tiny: tiny.name)


def tiny_architectures(architecture: Architecture) -> list[TinyArchitecture]:
    """The tiny models of a description. Raises AssertionError where it has none."""
    require(
        bool(architecture.examples),
        f"the architecture {architecture.name} gives no examples. Add examples={{name: example(CONFIG_CLASS, ...)}}",
    )
    return [TinyArchitecture(architecture, name) for name in architecture.examples]


@ARCHITECTURE.check()
def check_it_describes_its_examples(tiny: TinyArchitecture) -> None:
    """The configuration is of a model type of the description, and every parameter is claimed."""
    kind = tiny_config(tiny.example).model_type
    known = tiny.architecture.model_types
    require(kind in known, f"its model type is {kind}, the description is for {', '.join(known)}")
    graph = open_model(tiny_model(tiny.example)).graph  # raises for a parameter that is not described
    require(len(graph.blocks) > 0, "no block was found: blocks is the path of the list of blocks")


@ARCHITECTURE.check()
def check_every_site_can_be_changed(tiny: TinyArchitecture) -> None:
    """A map folded into each site, one after the other, leaves the model the same function.

    A site that the model does not have, or that no map passes, is left out; one at least must remain.
    """
    proved = []
    for name in SITE_NAMES:
        model, generator = tiny_model(tiny.example), torch.Generator().manual_seed(0)
        store = open_model(model)
        plan = FoldPlan(store.graph)
        try:
            for site in find_sites(store.graph, name):
                plan.add(site, next(_maps(site, generator)), None)
        except UnsupportedModelError:
            continue
        proved.append(name)
        try:
            prove(store, plan, BlockRunner(model, store.graph), tokens(model), _TOLERANCE)
        except ProofError as error:
            raise AssertionError(
                f"a map at {name} changes the model: some parameter reads or writes another basis than the description "
                f"says. {error}"
            ) from error
    require(bool(proved), "no site of it can be changed")


def _maps(site: Site, generator: torch.Generator) -> Iterator[maps.Map]:
    """A map that a site takes."""
    if site.name in ("attn_in", "mlp_in"):
        yield maps.Diagonal(torch.rand(site.n, generator=generator, dtype=torch.float64) + 0.5)
    if site.rope is not None:
        angles = 3 * torch.randn(site.rope.pairs, generator=generator)
        yield maps.PairRotation(site.n, angles, site.rope.interleaved)
    yield maps.random_signs(site.n, generator) @ maps.random_orthogonal(site.n, generator)


def check_architecture(architecture: Architecture) -> None:
    """Proves every site of every tiny model of a description. Raises AssertionError, naming the model, what is wrong
    and what to do.
    """
    for tiny in tiny_architectures(architecture):
        ARCHITECTURE.run(tiny)
