"""A fold plan whose learned maps are functions of tensors that gradients reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.learning.parameters import Place, parameter_of
from gyroquant.models.fold import ApplyMap, FoldPlan


def learnable(plan: FoldPlan, sites: Iterable[str]) -> dict[str, Place]:
    """The places of the last fused map of each site, by the site's label.

    Raises RecipeError for a site without a map to start from, UnsupportedModelError for one that must stay online,
    must keep the mean of a LayerNorm, or belongs to a single expert.
    """
    found: dict[str, Place] = {}
    for name in sites:
        there = [(i, *step) for i, step in enumerate(plan.folded) if step[0].name == name]
        fused = {site.label: (i, site, m) for i, site, m, online in there if not online}
        if not there:
            raise RecipeError(
                f"learn.sites has {name}, but the recipe puts no map there to start from: set transform.{name}.method"
            )
        why = "" if fused else "it runs online"
        for i, site, m in fused.values():
            found[site.label] = Place(i, parameter_of(m))
            if site.admits not in found[site.label].parameter.fits:
                raise RecipeError(
                    f"learn.sites has {name}, which takes {site.admits} maps, and the map to start from there would "
                    f"become another kind: put unit_scale there (transform.{name}.method), or take {name} out of it"
                )
            if site.keeps_mean:
                why = f"{site.label} has LayerNorms, whose mean a free rotation would not keep"
            elif any(port.expert is not None for port in (*site.writers, *site.readers)):
                why = f"{site.label} belongs to a single expert"
        if why:
            raise UnsupportedModelError(f"{name} cannot be learned: {why}; take {name} out of learn.sites")
    return found


def with_values(plan: FoldPlan, places: Mapping[str, Place], values: Mapping[str, Tensor]) -> FoldPlan:
    """The same plan with the maps of learned tensors at their places."""
    changed = FoldPlan(plan.graph)
    new = {place.index: place.parameter.map(values[label]) for label, place in places.items()}
    for i, (site, m, online) in enumerate(plan.folded):
        changed.add(site, new.get(i, m), online)
    return changed


class LiveFold:
    """Folded parameters as functions of the learned tensors; what does not depend on them is computed once.

    Edits from the first learned one on are made in fp32, each time.
    """

    def __init__(
        self, plan: FoldPlan, places: Mapping[str, Place], tensors: Mapping[str, Tensor], names: Iterable[str]
    ):
        self.names = tuple(names)
        learned = {place.index for place in places.values()}
        self._first: dict[str, int] = {}
        self._base: dict[str, Tensor] = {}
        self._tensors = tensors
        for name in self.names:
            value = tensors[name if name in tensors else plan.graph.tied[name]].double()
            edits = plan.edits.get(name, [])
            live = [isinstance(edit, ApplyMap) and edit.step in learned for edit in edits]
            first = live.index(True) if any(live) else None
            for edit in edits[:first]:
                if edit.port.expert is not None:
                    value[edit.port.expert] = edit(value[edit.port.expert][None], tensors)[0]
                else:
                    value = edit(value, tensors)
            self._base[name] = value.float()
            self._first[name] = len(edits) if first is None else first

    def __call__(self, plan: FoldPlan) -> dict[str, Tensor]:
        """The parameters, folded with the maps of `plan`, which has the same steps as the one at the start."""
        out = {}
        for name in self.names:
            value = self._base[name]
            for edit in plan.edits.get(name, [])[self._first[name] :]:
                if edit.port.expert is not None:
                    raise UnsupportedModelError(f"{name}: maps of single experts cannot lie behind a learned one")
                value = edit(value, self._tensors)
            out[name] = value
        return out
