"""Choosing a map for every site of a recipe: what can be chosen at once is, what must be measured first is measured.

Steps that need statistics are gathered, so that one pass over the text serves as many of them as possible; a further
pass is only needed where one measured map lies behind another in the same basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.measure import Want
from gyroquant.maps import Diagonal, Householder, Map, PairRotation, Permutation, dump, load
from gyroquant.methods import Context, Method
from gyroquant.models.fold import FoldPlan
from gyroquant.models.graph import ModelGraph
from gyroquant.models.sites import SITE_NAMES, Site, Structure, find_sites
from gyroquant.recipe import Recipe, Step

Measure = Callable[[FoldPlan, list[Want]], None]
"""Shows the wants the vectors of their sites, in the basis that a plan leaves them in."""


@dataclass(frozen=True)
class _Pending:
    site: str
    step: Step

    def behind(self, other: _Pending) -> bool:
        """Whether this step lies in a basis that `other` changes."""
        inside = {"attn_in": "R1", "mlp_in": "R1", "attn_out": "R2"}
        return self.site in (other.site, "linear") or inside.get(self.site) == other.site


Choose = Callable[[Method, Site, Recipe, Want | None], Map]
"""The map for a site: what a method makes of what was measured there."""


def plan_folds(
    graph: ModelGraph, recipe: Recipe, measure: Measure | None = None, choose: Choose | None = None
) -> FoldPlan:
    """Chooses a map for every site that the recipe names and plans its fold.

    Without `measure`, methods that need statistics are planned with stand-ins: good for checking, not for folding.
    Raises UnsupportedModelError or RecipeError, with the reason, for whatever cannot be done exactly; nothing is
    touched.
    """
    plan, choose = FoldPlan(graph), choose or _choose
    pending = [_Pending(name, step) for name in SITE_NAMES for step in recipe.transform.get(name, ())]
    while pending:
        wants: list[tuple[_Pending, Want]] = []
        waiting: list[_Pending] = []
        for one in pending:
            if any(one.behind(other) for other in waiting):
                waiting.append(one)
            elif one.step.method.looks and measure is not None:
                wants += [(one, Want(site, one.step.method.statistics)) for site in _sites(graph, one)]
                waiting.append(one)
            else:
                for site in _sites(graph, one):
                    plan.add(site, choose(one.step.method, site, recipe, None), one.step.online)
        if measure is not None and wants:
            measure(plan, [want for _, want in wants])
        for one, want in wants:
            plan.add(want.site, choose(one.step.method, want.site, recipe, want), one.step.online)
        done = {id(one) for one, _ in wants}
        pending = [one for one in waiting if id(one) not in done]
    return plan


def dump_plan(plan: FoldPlan) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The maps of a plan, in its order, as data and arrays."""
    arrays: dict[str, Tensor] = {}
    return [dump(m, arrays, f"map.{i}") for i, (_, m, _) in enumerate(plan.folded)], arrays


def load_plan(graph: ModelGraph, recipe: Recipe, maps: Iterable[dict[str, Any]], arrays: dict[str, Tensor]) -> FoldPlan:
    """The plan of a recipe with the maps that `dump_plan` gave, whether they were measured, learned or neither."""
    kept = iter([load(spec, arrays) for spec in maps])
    return plan_folds(graph, recipe, lambda plan, wants: None, lambda method, site, recipe, want: next(kept))


def _sites(graph: ModelGraph, one: _Pending) -> list[Site]:
    return find_sites(graph, one.site, online=bool(one.step.online), structure=one.step.method.structure)


def observed_sites(graph: ModelGraph, recipe: Recipe) -> list[tuple[Site, tuple[Callable[[int], Any], ...]]]:
    """Every site that is measured for a recipe, and the kinds of observers that look at it."""
    pending = [_Pending(name, step) for name in SITE_NAMES for step in recipe.transform.get(name, ())]
    return [
        (site, one.step.method.statistics) for one in pending if one.step.method.looks for site in _sites(graph, one)
    ]


def _choose(method: Method, site: Site, recipe: Recipe, want: Want | None) -> Map:
    grid = recipe.weights.grid
    context = Context(seed=recipe.seed, group_size=grid.group_size, grid=grid)
    if not method.looks:
        return method.choose(site, context)
    if want is None:
        method.check(site, context)
        return _stand_in(site, method.structure)
    if method.needs_weights:
        assert want.weights is not None
        context = replace(context, weights=want.weights)
    return method.choose(site, replace(context, statistics=want.seen))


def _stand_in(site: Site, structure: Structure) -> Map:
    """A map with the structure of the one to come, for checking."""
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
    """How often the text has to pass through the model until every map is chosen."""
    pending = [_Pending(name, step) for name in SITE_NAMES for step in recipe.transform.get(name, ())]
    passes = 0
    while pending:
        measured: list[_Pending] = []
        waiting: list[_Pending] = []
        for one in pending:
            if any(one.behind(other) for other in (*measured, *waiting)):
                waiting.append(one)
            elif one.step.method.looks:
                measured.append(one)
        passes += bool(measured)
        pending = waiting
    return passes
