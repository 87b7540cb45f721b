"""Fold plans with learned maps, and parameters that are differentiable in the learned tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.finetuning.parameters import Place, parameter_of
from gyroquant.models.folding.fold import ApplyMap, FoldPlan


def learnable(plan: FoldPlan, sites: Iterable[str]) -> dict[str, Place]:
    """The last fused map of each site, by the site's label.

    Raises RecipeError for a site without a map to start from, or if the learned map would have a structure that the
    site does not accept. Raises UnsupportedModelError if the map runs online, if it must keep the mean of a LayerNorm,
    or if the site belongs to a single expert.
    """
    places: dict[str, Place] = {}
    for name in sites:
        steps = [(i, *step) for i, step in enumerate(plan.folded) if step[0].name == name]
        fused = {site.label: (i, site, m) for i, site, m, online in steps if not online}
        if not steps:
            raise RecipeError(
                f"learn.sites has {name}, but the recipe puts no map there to start from; set transform.{name}.method"
            )
        reason = "" if fused else "it runs online"
        for i, site, m in fused.values():
            places[site.label] = Place(i, parameter_of(m))
            if site.admits not in places[site.label].parameter.fits:
                raise RecipeError(
                    f"learn.sites has {name}, which accepts {site.admits} maps, and learning would give another kind "
                    f"of map; set transform.{name}.method=unit_scale, or take {name} out of learn.sites"
                )
            if site.keeps_mean:
                reason = f"{site.label} has LayerNorms, whose mean a free rotation would not keep"
            elif any(port.expert is not None for port in (*site.writers, *site.readers)):
                reason = f"{site.label} belongs to a single expert"
        if reason:
            raise UnsupportedModelError(f"{name} cannot be learned: {reason}; take {name} out of learn.sites")
    return places


def with_values(plan: FoldPlan, places: Mapping[str, Place], values: Mapping[str, Tensor]) -> FoldPlan:
    """The same plan with the maps for the learned tensors at their places."""
    learned = FoldPlan(plan.graph, keeps_ties=plan.keeps_ties)
    new = {place.index: place.parameter.map(values[label]) for label, place in places.items()}
    for i, (site, m, online) in enumerate(plan.folded):
        learned.add(site, new.get(i, m), online)
    return learned


class DifferentiableFold:
    """Folded parameters as functions of the learned tensors.

    Edits before the first learned one are computed once, in fp64. All later edits are computed at every call, in fp32.
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
            is_learned = [isinstance(edit, ApplyMap) and edit.step in learned for edit in edits]
            first = is_learned.index(True) if any(is_learned) else None
            for edit in edits[:first]:
                if edit.port.expert is not None:
                    value[edit.port.expert] = edit(value[edit.port.expert][None], tensors)[0]
                else:
                    value = edit(value, tensors)
            self._base[name] = value.float()
            self._first[name] = len(edits) if first is None else first

    def __call__(self, plan: FoldPlan) -> dict[str, Tensor]:
        """The parameters folded with the maps of `plan`. It must have the same steps as the plan at the start."""
        out = {}
        for name in self.names:
            value = self._base[name]
            for edit in plan.edits.get(name, [])[self._first[name] :]:
                if edit.port.expert is not None:
                    raise UnsupportedModelError(
                        f"{name}: a map of a single expert cannot come after a learned map; put it before, or "
                        "leave it out"
                    )
                value = edit(value, self._tensors)
            out[name] = value
        return out
