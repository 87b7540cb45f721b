"""A fold plan whose learned maps are tensors that gradients reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.maps import BlockDiagonal, Dense, Map
from gyroquant.models.fold import ApplyMap, FoldPlan


def learnable(plan: FoldPlan, sites: Iterable[str]) -> dict[str, int]:
    """The places in ``plan.folded`` of the last fused map of each site, by the site's label.

    Raises RecipeError for a site without a map to start from, UnsupportedModelError for one that must stay online or
    must keep the mean of a LayerNorm.
    """
    found: dict[str, int] = {}
    for name in sites:
        places = {site.label: i for i, (site, _, _) in enumerate(plan.folded) if site.name == name}
        if not places:
            raise RecipeError(
                f"learn.sites has {name}, but the recipe puts no map there to start from: set transform.{name}.method"
            )
        for i in places.values():
            site, _, online = plan.folded[i]
            if online or site.keeps_mean:
                why = "runs online" if online else "has LayerNorms, whose mean a free rotation would not keep"
                raise UnsupportedModelError(
                    f"{name} ({site.label}) cannot be learned: it {why}; take {name} out of learn.sites"
                )
        found |= places
    return found


def start_matrix(m: Map) -> Tensor:
    """A map as blocks to learn, shape (blocks, n, n), fp64: its own blocks, or one that is all of it."""
    if isinstance(m, BlockDiagonal) and len({part.n for part in m.parts}) == 1:
        parts = [part.dense() for part in m.parts] * m.repeat
        return torch.stack(parts)
    return m.dense()[None]


def as_map(matrix: Tensor) -> Map:
    """Learned blocks, shape (blocks, n, n), as a map."""
    return Dense(matrix[0]) if len(matrix) == 1 else BlockDiagonal(tuple(Dense(block) for block in matrix))


def with_maps(plan: FoldPlan, places: Mapping[str, int], maps: Mapping[str, Map]) -> FoldPlan:
    """The same plan with other maps at some places."""
    changed = FoldPlan(plan.graph)
    new = {place: maps[label] for label, place in places.items()}
    for i, (site, m, online) in enumerate(plan.folded):
        changed.add(site, new.get(i, m), online)
    return changed


class LiveFold:
    """Folded parameters as functions of the learned matrices; what does not depend on them is computed once.

    Edits from the first learned one on are made in fp32, each time.
    """

    def __init__(self, plan: FoldPlan, places: Mapping[str, int], tensors: Mapping[str, Tensor], names: Iterable[str]):
        self.names = tuple(names)
        self._learned = {id(m) for i in places.values() for m in _parts(plan.folded[i][1])}
        self._first: dict[str, int] = {}
        self._base: dict[str, Tensor] = {}
        self._tensors = tensors
        for name in self.names:
            value = tensors[name if name in tensors else plan.graph.tied[name]].double()
            edits = plan.edits.get(name, [])
            live = [isinstance(edit, ApplyMap) and id(edit.map) in self._learned for edit in edits]
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


def _parts(m: Map) -> tuple[Map, ...]:
    return (m, m.contragredient())
