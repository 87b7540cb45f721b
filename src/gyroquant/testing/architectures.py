"""The contract of architectures."""

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
    """An architecture and the name of one of its tiny models."""

    architecture: Architecture
    name: str

    @property
    def example(self) -> Example:
        """The settings of the tiny model."""
        return self.architecture.examples[self.name]


ARCHITECTURE: Contract[TinyArchitecture] = Contract("architecture", TinyArchitecture, lambda tiny: tiny.name)


def tiny_architectures(architecture: Architecture) -> list[TinyArchitecture]:
    """The tiny models of an architecture. Raises AssertionError if it does not have any."""
    require(
        bool(architecture.examples),
        f"the architecture {architecture.name} gives no examples. Add examples={{name: example(CONFIG_CLASS, ...)}}",
    )
    return [TinyArchitecture(architecture, name) for name in architecture.examples]


@ARCHITECTURE.check()
def check_it_describes_its_examples(tiny: TinyArchitecture) -> None:
    """The architecture lists the model type of the configuration, and every parameter is claimed."""
    model_type = tiny_config(tiny.example).model_type
    supported = tiny.architecture.model_types
    require(
        model_type in supported, f"its model type is {model_type}, but the architecture is for {', '.join(supported)}"
    )
    graph = open_model(tiny_model(tiny.example)).graph  # raises for an unclaimed parameter
    require(len(graph.blocks) > 0, "no block was found. Set blocks to the path of the list of blocks")


@ARCHITECTURE.check()
def check_every_site_can_be_changed(tiny: TinyArchitecture) -> None:
    """A map that is folded into one site at a time does not change the function of the model.

    Sites that the model does not have, or that no map can pass, are left out. At least one site must remain.
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
                f"a map at {name} changes the model: some parameter reads or writes another basis than the "
                f"architecture states. {error}"
            ) from error
    require(bool(proved), "no site of the model can be changed")


def _maps(site: Site, generator: torch.Generator) -> Iterator[maps.Map]:
    """Maps that a site takes."""
    if site.name in ("attn_in", "mlp_in"):
        yield maps.Diagonal(torch.rand(site.n, generator=generator, dtype=torch.float64) + 0.5)
    if site.rope is not None:
        angles = 3 * torch.randn(site.rope.pairs, generator=generator)
        yield maps.PairRotation(site.n, angles, site.rope.interleaved)
    yield maps.random_signs(site.n, generator) @ maps.random_orthogonal(site.n, generator)


def check_architecture(architecture: Architecture) -> None:
    """Proves every site of every tiny model of an architecture.

    Raises AssertionError, which names the model, what is wrong and what to do.
    """
    for tiny in tiny_architectures(architecture):
        ARCHITECTURE.run(tiny)
