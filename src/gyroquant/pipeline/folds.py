"""Chooses a map for every site of a recipe. Maps that depend on statistics are chosen after a measurement.

One pass over the text measures for as many steps of the recipe as possible. Another pass is needed only if a measured
map comes after another measured map in the same basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.measure import SiteMeasurement
from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Diagonal, Householder, Map, PairRotation, Permutation, dump, load
from gyroquant.methods import Context, Method
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.model_graph import ModelGraph
from gyroquant.models.graph.sites import SITE_NAMES, SITES, Site, Structure, find_sites
from gyroquant.recipes.schema import Recipe, Step

Measure = Callable[[FoldPlan, list[SiteMeasurement]], None]
"""Measures sites: fills each `SiteMeasurement` with statistics of the vectors at its site, after the maps of a plan."""


@dataclass(frozen=True)
class _Pending:
    site: str
    step: Step

    def depends_on(self, other: _Pending) -> bool:
        """Whether `other` changes the basis of this step."""
        return SITES[self.site].lies_in(other.site)


Choose = Callable[[Method, Site, Recipe, SiteMeasurement | None], Map]
"""Chooses the map for a site: (method, site, recipe, measurement) -> map."""


def plan_folds(
    graph: ModelGraph, recipe: Recipe, measure: Measure | None = None, choose: Choose | None = None
) -> FoldPlan:
    """Chooses a map for every site that the recipe names and plans its fold.

    Without `measure`, methods that need statistics get placeholder maps, which can be checked but must not be folded.
    Raises UnsupportedModelError or RecipeError, with the reason, if a fold cannot be exact. The model does not change.
    """
    plan, choose = FoldPlan(graph, keeps_ties=recipe.keep_ties), choose or _choose
    pending = [_Pending(name, step) for name in SITE_NAMES for step in recipe.transform.get(name, ())]
    while pending:
        measured: list[tuple[_Pending, SiteMeasurement]] = []
        waiting: list[_Pending] = []
        for entry in pending:
            method = entry.step.method
            if any(entry.depends_on(other) for other in waiting):
                waiting.append(entry)
            elif method.looks and measure is not None:
                measured += [(entry, SiteMeasurement(site, method.statistics)) for site in _sites(graph, entry)]
                waiting.append(entry)
            else:
                try:
                    online = _online(graph, entry)
                    for site in _sites(graph, entry):
                        if not (entry.step.optional and plan.is_turned(site)):
                            plan.check_open(site, online)  # kept maps are counted: none is for a site without one
                            plan.add(site, choose(method, site, recipe, None), online)
                except UnsupportedModelError as error:
                    if not entry.step.optional:
                        raise
                    plan.left_out.append(f"{entry.site} is left out: {error}")
        if measure is not None and measured:
            measure(plan, [measurement for _, measurement in measured])
        for entry, measurement in measured:
            site, step = measurement.site, entry.step
            plan.add(site, choose(step.method, site, recipe, measurement), _online(graph, entry))
        done = {id(entry) for entry, _ in measured}
        pending = [entry for entry in waiting if id(entry) not in done]
    return plan


def dump_plan(plan: FoldPlan) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The maps of a plan, in the order of the plan, as data and arrays."""
    arrays: dict[str, Tensor] = {}
    return [dump(m, arrays, f"map.{i}") for i, (_, m, _) in enumerate(plan.folded)], arrays


def load_plan(graph: ModelGraph, recipe: Recipe, maps: Iterable[dict[str, Any]], arrays: dict[str, Tensor]) -> FoldPlan:
    """The plan of a recipe with the maps that `dump_plan` returned: measured, learned, or chosen without statistics."""
    loaded = iter([load(spec, arrays) for spec in maps])
    return plan_folds(graph, recipe, lambda plan, sites: None, lambda method, site, recipe, site_data: next(loaded))


def _online(graph: ModelGraph, entry: _Pending) -> bool | None:
    """Whether the maps of a step run with this model; None: as each site allows."""
    if entry.step.online != "fallback":
        return entry.step.online
    fused = find_sites(graph, entry.site, structure=entry.step.method.structure)
    return True if any(site.blocked for site in fused) else None


def _sites(graph: ModelGraph, entry: _Pending) -> list[Site]:
    online = bool(_online(graph, entry))
    return find_sites(graph, entry.site, online=online, structure=entry.step.method.structure)


def observed_sites(graph: ModelGraph, recipe: Recipe) -> list[tuple[Site, tuple[Callable[[int], Any], ...]]]:
    """Every site that is measured for a recipe, and the kinds of its observers."""
    pending = [_Pending(name, step) for name in SITE_NAMES for step in recipe.transform.get(name, ())]
    return [
        (site, entry.step.method.statistics)
        for entry in pending
        if entry.step.method.looks
        for site in _sites(graph, entry)
    ]


def _choose(method: Method, site: Site, recipe: Recipe, measurement: SiteMeasurement | None) -> Map:
    grid = recipe.weights.grid
    context = Context(seed=recipe.seed, group_size=grid.group_size, grid=grid)
    if not method.looks:
        return method.choose(site, context)
    if measurement is None:
        method.check(site, context)
        return _placeholder(site, method.structure)
    if method.needs_weights:
        assert measurement.weights is not None
        context = replace(context, weights=measurement.weights)
    return method.choose(site, replace(context, statistics=measurement.seen))


def _placeholder(site: Site, structure: Structure) -> Map:
    """A map with the structure of the map that will be chosen later. It serves for checks only."""
    n = site.n
    if structure == "pairs" and site.rope is not None:
        return PairRotation(n, torch.ones(site.rope.pairs, dtype=torch.float64), site.rope.interleaved)
    if structure == "permutation":
        return Permutation(torch.arange(n))
    one = torch.ones(n, dtype=torch.float64)
    if structure == "diagonal":
        return Diagonal(one)
    mixing = Householder(torch.nn.functional.one_hot(torch.tensor(0), n).double())
    return mixing if structure == "orthogonal" else mixing @ Diagonal(one)


def measuring_passes(recipe: Recipe) -> int:
    """The number of passes of the text through the model that are needed to choose every map."""
    pending = [_Pending(name, step) for name in SITE_NAMES for step in recipe.transform.get(name, ())]
    passes = 0
    while pending:
        measured: list[_Pending] = []
        waiting: list[_Pending] = []
        for entry in pending:
            if any(entry.depends_on(other) for other in (*measured, *waiting)):
                waiting.append(entry)
            elif entry.step.method.looks:
                measured.append(entry)
        passes += bool(measured)
        pending = waiting
    return passes
