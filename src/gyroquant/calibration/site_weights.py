"""The weights that read a site, in the basis that the site has after all maps planned so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gyroquant.models.folding.fold import AbsorbGain, Edit, FoldPlan, edited
from gyroquant.models.graph.model_graph import LinearOp, Port
from gyroquant.models.graph.sites import Site
from gyroquant.models.stores.base import WeightStore


class Reader:
    """Reads parameters from a store and keeps the last ones, because stacked experts are requested one by one."""

    def __init__(self, store: WeightStore):
        self.store = store
        self._last: tuple[list[str], dict[str, Tensor]] = ([], {})

    def __call__(self, names: list[str]) -> dict[str, Tensor]:
        if self._last[0] != names:
            self._last = ([], {})  # frees the last ones before the next are read
            self._last = (names, self.store.read(names))
        return self._last[1]


@torch.no_grad()
def reader_weights(read: Reader, plan: FoldPlan, site: Site) -> Iterator[Tensor]:
    """Every weight that reads a site and will be rounded (routers are not), one after another, experts one by one.

    Shape (rows, k n), fp32. The site's basis lies along the last dimension, repeated k times if k heads share it. Each
    weight is read when it is requested, so memory holds one weight, or one parameter of stacked experts.
    """
    for port in site.readers:
        op = plan.graph.find_op(port.param)
        if op is not None and op.entry.quantize:
            edits = [*plan.edits.get(port.param, ()), *coming_gains(plan, site, port)]
            yield from _views(op, port, edits, _tensors(read, plan, port.param, edits))


def coming_gains(plan: FoldPlan, site: Site, port: Port) -> list[AbsorbGain]:
    """The gains that a port will absorb with the next map at the site."""
    absorbed = [edit.norm.module for edit in plan.edits.get(port.param, ()) if isinstance(edit, AbsorbGain)]
    norms = [norm for norm, readers in site.absorbs if any(reader.param == port.param for reader in readers)]
    return [AbsorbGain(port, norm) for norm in norms if norm.module not in absorbed]


def _tensors(read: Reader, plan: FoldPlan, param: str, edits: list[Edit]) -> dict[str, Tensor]:
    stored = plan.graph.tied.get(param, param)
    gains = {edit.norm.gain for edit in edits if isinstance(edit, AbsorbGain)}
    tensors = read([stored, *sorted(gains)])
    return tensors | {param: tensors[stored]}


def _views(op: LinearOp, port: Port, edits: list[Edit], tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    value = tensors[port.param]
    if not op.entry.stacked:
        yield _view(edited(value, edits, tensors), port)
        return
    for expert in range(len(value)) if port.expert is None else (port.expert,):
        yield _view(edited(value[expert : expert + 1], edits, tensors, first=expert), port)


def _view(value: Tensor, port: Port) -> Tensor:
    part = value if port.rows is None else value.index_select(port.axis, port.rows.to(value.device))
    part = part.movedim(port.axis, -1)
    return part.reshape(-1, part.shape[-1]).float()
