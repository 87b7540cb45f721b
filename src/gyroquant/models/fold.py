"""Folding: multiply a map into every parameter that writes a site and its contragredient into every one that reads it.

A `FoldPlan` says, for each parameter, which edits to make in which order. It is built before anything is touched, so
that whatever cannot be folded is refused with the model as it was. Edits are made in fp64, one parameter at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import BlockDiagonal, Identity, Map, blocks, fixing_ones, product
from gyroquant.models.graph import ModelGraph, NormOp, Port
from gyroquant.models.online import OnlineMap
from gyroquant.models.sites import Insertion, Site, Span

# A parameter whose rows can be edited apart from each other is folded in pieces of about this many entries.
_CHUNK = 1 << 24
# Sites that no parameter writes linearly: maps there run online without being asked to.
_ONLINE_SITES = frozenset({"attn_out", "R3", "R4", "linear"})


@dataclass(frozen=True)
class ApplyMap:
    """Multiplies a port by a map, block by block where the port is longer than the map.

    `step` is the place in `FoldPlan.folded` of the map that this is part of.
    """

    port: Port
    map: Map
    step: int

    def __call__(self, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        axis, rows = self.port.axis, self.port.rows
        part = value if rows is None else value.index_select(axis, rows.to(value.device))
        changed = blocks(self.map, part.shape[axis]).apply(part + self.port.offset, axis) - self.port.offset
        return changed if rows is None else value.index_copy(axis, rows.to(value.device), changed)


@dataclass(frozen=True)
class AbsorbGain:
    """Multiplies the input axis of a parameter by the gain of the norm in front of it."""

    port: Port
    norm: NormOp

    def __call__(self, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        shape = [1] * value.dim()
        shape[self.port.axis] = -1
        return value * _gain(self.norm, tensors).to(value).view(shape)


@dataclass(frozen=True)
class ResetGain:
    """Sets the gain of a norm to one once its readers have absorbed it."""

    port: Port
    norm: NormOp

    def __call__(self, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(value, 1.0 - self.norm.entry.offset)


@dataclass(frozen=True)
class DivideBias:
    """Divides the bias of a norm by the gain that its readers have absorbed."""

    port: Port
    norm: NormOp

    def __call__(self, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        gain = _gain(self.norm, tensors).to(value)
        if bool(((gain == 0) & (value != 0)).any()):
            raise UnsupportedModelError(
                f"{self.norm.module} has a channel with gain 0 and a bias, which no basis change of the residual "
                "stream can keep; leave R1 out"
            )
        return torch.where(gain == 0, value, value / gain)


Edit = ApplyMap | AbsorbGain | ResetGain | DivideBias


def _gain(norm: NormOp, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[norm.gain].double() + norm.entry.offset


@dataclass
class FoldPlan:
    """Which edits each parameter gets, which maps run online, and what was put where."""

    graph: ModelGraph
    edits: dict[str, list[Edit]] = field(default_factory=lambda: defaultdict(list))
    online: list[OnlineMap] = field(default_factory=list)
    folded: list[tuple[Site, Map, bool]] = field(default_factory=list)
    _absorbed: set[str] = field(default_factory=set)
    _behind: dict[Insertion, dict[int, tuple[Span, Map]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, site: Site, m: Map, online: bool | None = None) -> None:
        """Plans the fold of a map into a site: fused, or online where `online` says so or the site knows no other way.

        Raises UnsupportedModelError, with the reason and the remedy, when it cannot be done exactly.
        """
        if m.n != site.n:
            raise UnsupportedModelError(f"{site.label} has {site.n} coordinates, the map for it has {m.n}")
        if isinstance(m, Identity):
            self.folded.append((site, m, False))
            return
        problem = site.fused_problem(m)
        by_itself = bool(problem) and site.name in _ONLINE_SITES and bool(site.insertions)
        run_online = by_itself if online is None else online
        if run_online:
            self._add_online(site, m)
        elif problem:
            remedy = f"; set transform.{site.name}.online=true to run it while the model runs, or leave {site.name} out"
            raise UnsupportedModelError(f"{self.graph.config.model_type}: {problem}{remedy}")
        else:
            m = self._add_fused(site, m)
        self.folded.append((site, m, run_online))

    def _add_online(self, site: Site, m: Map) -> None:
        m = m.in_fp32()  # what runs, and is stored; the weights take the inverse of exactly that
        if site.behind:
            self._apply((*site.writers, *site.readers), m)
            for insertion, span in site.behind:
                self._undo(insertion, span, m.inverse().in_fp32())
            return
        if not site.insertions:
            raise UnsupportedModelError(f"{site.label} has no place where a map could run online; fuse it instead")
        if site.admits_online == "orthogonal" and not m.orthogonal:
            raise UnsupportedModelError(f"{site.label} can only take an orthogonal map")
        self._apply(site.readers, m.contragredient())
        self.online += [OnlineMap(insertion, m) for insertion in site.insertions]

    def _undo(self, insertion: Insertion, span: Span, m: Map) -> None:
        """Lets a map run on some coordinates of an output, in one online map with all others there."""
        spans = self._behind[insertion]
        m = blocks(m, span.stop - span.start)
        before = spans.get(span.start)
        spans[span.start] = (span, m if before is None else product(m, before[1]))
        parts: list[Map] = []
        end = 0
        for start, (one, part) in sorted(spans.items()):
            parts += [Identity(start - end)] * (start > end) + [part]
            end = one.stop
        parts += [Identity(span.size - end)] * (span.size > end)
        whole = parts[0] if len(parts) == 1 else BlockDiagonal(tuple(parts))
        places = [number for number, one in enumerate(self.online) if one.insertion == insertion]
        if places:
            self.online[places[0]] = OnlineMap(insertion, whole)
        else:
            self.online.append(OnlineMap(insertion, whole))

    def _add_fused(self, site: Site, m: Map) -> Map:
        if site.keeps_mean:
            m = fixing_ones(m)
        if not m.diagonal:
            for norm, readers in site.absorbs:
                self._absorb(norm, readers)
        self._apply(site.writers, m)
        self._apply(site.readers, m.contragredient())
        return m

    def _absorb(self, norm: NormOp, readers: tuple[Port, ...]) -> None:
        if norm.module in self._absorbed:
            return
        self._absorbed.add(norm.module)
        for port in readers:
            self.edits[port.param].append(AbsorbGain(port, norm))
        if norm.bias:
            self.edits[norm.bias].append(DivideBias(Port(norm.bias, 0), norm))
        self.edits[norm.gain].append(ResetGain(Port(norm.gain, 0), norm))

    def _apply(self, ports: tuple[Port, ...], m: Map) -> None:
        for port in ports:
            self.edits[port.param].append(ApplyMap(port, m, len(self.folded)))

    def online_in(self, block: int) -> list[OnlineMap]:
        """The online maps of one block."""
        return self.graph.in_block(block, self.online)

    def unties(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The tied parameters that the plan makes different from the one they are tied to.

        `tensors` are the original parameters around the blocks.
        """

        def effective(name: str) -> list[tuple[int, int]]:
            kept = []
            for edit in self.edits.get(name, ()):
                if isinstance(edit, ApplyMap):
                    kept.append((edit.port.axis, id(edit.map)))
                elif not bool((_gain(edit.norm, tensors) == 1).all()):
                    kept.append((edit.port.axis, id(edit)))
            return kept

        return tuple(alias for alias, name in self.graph.tied.items() if effective(alias) != effective(name))


def fold(plan: FoldPlan, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The parameters `names` (default: all of `tensors`) after the plan's edits.

    `tensors` hold the original parameters of one block, or of what lies around the blocks. Edited ones come back in
    fp32, computed in fp64; others as they are. A tied name gets the value of the parameter it is tied to before its
    own edits.
    """
    out: dict[str, Tensor] = {}
    for name in tensors if names is None else names:
        value = tensors[name if name in tensors else plan.graph.tied[name]]
        out[name] = edited(value, plan.edits.get(name, []), tensors)
    return out


def edited(value: Tensor, edits: Sequence[Edit], tensors: Mapping[str, Tensor], first: int = 0) -> Tensor:
    """A parameter after some edits, in fp32; `tensors` hold the gains that they need.

    Of stacked experts `value` may be some only, the `first` of them of that number.
    """
    if not edits:
        return value
    splittable = value.dim() > 1 and all(edit.port.axis % value.dim() != 0 for edit in edits)
    step = max(1, _CHUNK // max(1, value[0].numel())) if splittable else value.shape[0]
    if any(edit.port.expert is not None for edit in edits):
        step = 1  # experts lie along the first axis
    out = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    for start in range(0, value.shape[0], step):
        piece = value[start : start + step].double()
        for edit in edits:
            if edit.port.expert in (None, first + start):
                piece = edit(piece, tensors)
        out[start : start + step] = piece
    return out
