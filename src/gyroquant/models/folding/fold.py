"""Folding: multiplies a map into every parameter that writes to a site.

Parameters that read from the site are multiplied by the map's contragredient. A `FoldPlan` lists the edits of each
parameter in order. It is built before any parameter changes, so a map that cannot be folded raises an error and leaves
the model as it was. Edits are computed in fp64, one parameter at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import BlockDiagonal, Identity, Map, blocks, preserve_mean, product
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph, NormOp, Port
from gyroquant.models.graph.sites import HookPoint, Site, Span

# A parameter whose rows can be edited independently of each other is folded in pieces of about this many entries.
_CHUNK = 1 << 24


class Source(Protocol):
    """Reads original parameters by name."""

    def read(self, names: tuple[str, ...]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class ApplyMap:
    """Multiplies a port by a map, block by block if the port is longer than the map.

    `step` is the index of the map's entry in `FoldPlan.folded`.
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
    """Multiplies the input axis of a parameter by the gain of the norm before it."""

    port: Port
    norm: NormOp

    def __call__(self, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        shape = [1] * value.dim()
        shape[self.port.axis] = -1
        return value * _gain(self.norm, tensors).to(value).view(shape)


@dataclass(frozen=True)
class ResetGain:
    """Sets the gain of a norm to one after its readers have absorbed it."""

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
                f"{self.norm.module} has a channel with gain 0 and a bias, which cannot be absorbed; leave R1 out"
            )
        return torch.where(gain == 0, value, value / gain)


Edit = ApplyMap | AbsorbGain | ResetGain | DivideBias


def _gain(norm: NormOp, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[norm.gain].double() + norm.entry.offset


@dataclass
class FoldPlan:
    """A plan of folds.

    - edits: the edits of each parameter, in order.
    - online: the maps that run online.
    - folded: for each planned map: its site, the map, and whether it runs online.
    - left_out: for each optional map that the model does not allow: a sentence with the reason.
    - keeps_ties: a head that is tied to the embedding stays so when R1 is fused. The gain of the last norm then cannot
      go into the head. Instead the residual stream is turned back before the last norm, and turned again after it: two
      online maps, once a token.
    """

    graph: ModelGraph
    edits: dict[str, list[Edit]] = field(default_factory=lambda: defaultdict(list))
    online: list[OnlineMap] = field(default_factory=list)
    folded: list[tuple[Site, Map, bool]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    keeps_ties: bool = False
    _absorbed: set[str] = field(default_factory=set)
    _inverses: dict[HookPoint, dict[int, tuple[Span, Map]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, site: Site, m: Map, online: bool | None = None) -> None:
        """Plans the fold of a map into a site.

        `online` states whether the map runs online. None: it is fused if it can be, and runs online if it cannot be and
        the site is `online_unasked`. Raises UnsupportedModelError, with the reason and the remedy, if the map cannot be
        folded exactly.
        """
        if m.n not in (site.n, site.n * site.copies):
            raise UnsupportedModelError(
                f"{site.label} has {site.n} coordinates, but its map has {m.n}; choose a map of {site.n}"
            )
        if isinstance(m, Identity):
            self.folded.append((site, m, False))
            return
        if self.is_turned(site):
            raise UnsupportedModelError(
                f"a map at {site.kind.turned_by} changes {site.label} already; leave {site.name} out, or set "
                f"transform.{site.name}.optional=true for models whose {site.kind.turned_by} is left out"
            )
        problem = site.fused_problem(m)
        run_online = bool(problem) and site.online_unasked if online is None else online
        if run_online:
            self._add_online(site, m)
        elif problem:
            raise self._refusal(site, problem)
        else:
            m = self._add_fused(site, m)
        self.folded.append((site, m, run_online))

    def check_open(self, site: Site, online: bool | None = None) -> None:
        """Raises UnsupportedModelError, as `add` would, for a site that takes no map at all."""
        if site.blocked and not (site.online_unasked if online is None else online):
            raise self._refusal(site, site.blocked)

    def _refusal(self, site: Site, problem: str) -> UnsupportedModelError:
        remedy = f"; set transform.{site.name}.online=true to run it with the model, or leave {site.name} out"
        return UnsupportedModelError(f"{self.graph.config.model_type}: {problem}{remedy}")

    def is_turned(self, site: Site) -> bool:
        """Whether a fused map at another site, planned before, changes the ports of this one; see `SiteKind`."""
        return any(
            other.name == site.kind.turned_by and not online and not isinstance(m, Identity)
            for other, m, online in self.folded
        )

    def _add_online(self, site: Site, m: Map) -> None:
        m = m.in_fp32()  # the model runs and stores this map, so weights are multiplied by the inverse of exactly this
        if site.inverse_at:
            self._apply((*site.writers, *site.readers), m)
            for hook_point, span in site.inverse_at:
                self._undo(hook_point, span, m.inverse().in_fp32())
            self.online += [OnlineMap(hook_point, m.contragredient().in_fp32()) for hook_point in site.hook_points]
            return
        if not site.hook_points:
            raise UnsupportedModelError(
                f"{site.label} has no hook point, so its map cannot run online; set transform.{site.name}.online=false"
            )
        if site.admits_online == "orthogonal" and not m.orthogonal:
            raise UnsupportedModelError(
                f"{site.label} can only run an orthogonal map online; choose a method that gives one"
            )
        self._apply(site.readers, m.contragredient())
        widths = [m.n] * len(site.hook_points)
        if len(site.readers) == len(site.hook_points):  # a layer may read several vectors at once
            widths = [self.graph.shapes[port.param][port.axis] for port in site.readers]
        pairs = zip(site.hook_points, widths, strict=True)
        self.online += [OnlineMap(hook_point, blocks(m, width)) for hook_point, width in pairs]

    def _undo(self, hook_point: HookPoint, span: Span, m: Map) -> None:
        """Plans a map on a span of an output. All maps of that output are joined in one block-diagonal online map."""
        spans = self._inverses[hook_point]
        m = blocks(m, span.stop - span.start)
        earlier = spans.get(span.start)
        spans[span.start] = (span, m if earlier is None else product(m, earlier[1]))
        parts: list[Map] = []
        end = 0
        for start, (covered, part) in sorted(spans.items()):
            parts += [Identity(start - end)] * (start > end) + [part]
            end = covered.stop
        parts += [Identity(span.size - end)] * (span.size > end)
        whole = parts[0] if len(parts) == 1 else BlockDiagonal(tuple(parts))
        numbers = [number for number, op in enumerate(self.online) if op.hook_point == hook_point]
        if numbers:
            self.online[numbers[0]] = OnlineMap(hook_point, whole)
        else:
            self.online.append(OnlineMap(hook_point, whole))

    def _add_fused(self, site: Site, m: Map) -> Map:
        if site.keeps_mean:
            m = preserve_mean(m)
        kept = self._tied_head() if site.name == "R1" else None
        if kept is not None:
            site = _without(site, *kept)
            self._turn_around(*kept, m)
        if not m.diagonal:
            for norm, readers in site.absorbs:
                self._absorb(norm, readers)
        self._apply(site.writers, m)
        self._apply(site.readers, m.contragredient())
        return m

    def _tied_head(self) -> tuple[NormOp, LinearOp] | None:
        """The last norm and the head, if the head is tied to the embedding and the plan keeps it so."""
        if not self.keeps_ties:
            return None
        for alias in self.graph.tied:
            head = self.graph.find_op(alias)
            norms = [norm for norm in self.graph.outer.norms if head and norm.entry.writes == head.entry.reads]
            if head is not None and len(norms) == 1 and self.graph.outer.readers(head.entry.reads) == (head,):
                return norms[0], head
        return None

    @property
    def kept_tied(self) -> tuple[str, ...]:
        """The tied parameters that stay tied because of `keeps_ties`."""
        head = self._tied_head()
        return () if head is None else (head[1].weight,)

    def _turn_around(self, norm: NormOp, head: LinearOp, m: Map) -> None:
        """Plans the maps around the last norm, for a map of the residual stream that comes after those of the plan."""
        points = (HookPoint("input", norm.module), HookPoint("input", head.module))
        maps = {op.hook_point: op.map for op in self.online if op.hook_point in points}
        self.online = [op for op in self.online if op.hook_point not in points]
        back = m.inverse() if points[0] not in maps else product(m.inverse(), maps[points[0]])
        again = m if points[1] not in maps else product(maps[points[1]], m)
        self.online += [OnlineMap(points[0], back.in_fp32()), OnlineMap(points[1], again.in_fp32())]

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

    def read_block(self, source: Source, index: int) -> dict[str, Tensor]:
        """The folded parameters of one block, from a source of the original ones; see `fold`."""
        return fold(self, source.read(self.graph.block_params(index)))

    def read_outer(self, source: Source) -> dict[str, Tensor]:
        """The folded parameters around the blocks, from the same source; see `folded_outer`."""
        return folded_outer(self, source.read(self.graph.outer_params()))

    def unties(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The names of tied parameters, if one is no longer equal to its stored parameter after the plan's edits.

        `tensors` are the original parameters around the blocks.
        """

        def effective(name: str) -> list[tuple[int, int]]:
            """The edits that change a parameter; absorbing gains of 1 does not."""
            changes = []
            for edit in self.edits.get(name, ()):
                if isinstance(edit, ApplyMap):
                    changes.append((edit.port.axis, id(edit.map)))
                elif not bool((_gain(edit.norm, tensors) == 1).all()):
                    changes.append((edit.port.axis, id(edit)))
            return changes

        aliases = {alias: name for alias, name in self.graph.tied.items() if alias not in self.kept_tied}
        if all(effective(alias) == effective(name) for alias, name in aliases.items()):
            return ()
        return tuple(aliases)  # one setting ties all of them, such as the head and its bias


def _without(site: Site, norm: NormOp, head: LinearOp) -> Site:
    """R1 without the last norm and a tied head, which read the stream in its own basis."""
    return replace(
        site,
        writers=tuple(port for port in site.writers if port.param != norm.bias),
        readers=tuple(port for port in site.readers if port.param != head.weight),
        absorbs=tuple((other, ports) for other, ports in site.absorbs if other.module != norm.module),
    )


def fold(plan: FoldPlan, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The parameters `names` (default: all of `tensors`) after the plan's edits.

    `tensors` are the original parameters of one block, or those around the blocks. Edits are computed in fp64 and
    returned in fp32. Parameters without edits are returned unchanged. The edits of a tied parameter start from its
    stored parameter.
    """
    out: dict[str, Tensor] = {}
    for name in tensors if names is None else names:
        value = tensors[name if name in tensors else plan.graph.tied[name]]
        out[name] = edited(value, plan.edits.get(name, []), tensors)
    return out


def fp32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp32. Integers, which buffers may hold, are unchanged."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def folded_outer(plan: FoldPlan, outer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The folded parameters around the blocks, fp32. Those that are no longer tied have their own names."""
    return fp32(fold(plan, outer, (*outer, *plan.unties(outer))))


def edited(value: Tensor, edits: Sequence[Edit], tensors: Mapping[str, Tensor], first: int = 0) -> Tensor:
    """A parameter after edits, in fp32. `tensors` hold the gains that the edits need.

    `value` may be a range of stacked experts. `first` is then the number of the first expert in it.
    """
    if not edits:
        return value
    splittable = value.dim() > 1 and all(edit.port.axis % value.dim() != 0 for edit in edits)
    step = max(1, _CHUNK // max(1, value[0].numel())) if splittable else value.shape[0]
    if any(edit.port.expert is not None for edit in edits):
        step = 1  # the first axis counts experts
    out = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    for start in range(0, value.shape[0], step):
        piece = value[start : start + step].double()
        for edit in edits:
            if edit.port.expert in (None, first + start):
                piece = edit(piece, tensors)
        out[start : start + step] = piece
    return out
