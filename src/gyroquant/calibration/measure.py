"""The station that observes: the original model runs once over the text, and vectors at chosen sites are measured.

They are measured in the basis that a site has after everything already planned for it, so that a method sees what its
map will act on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import See, input_key, watch, watch_output
from gyroquant.calibration.stream import Stream
from gyroquant.calibration.weights import Reader, coming_gains, reader_weights
from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import blocks
from gyroquant.models.fold import AbsorbGain, ApplyMap, FoldPlan
from gyroquant.models.graph import LinearOp, ModelGraph, Port
from gyroquant.models.runner import BlockRunner
from gyroquant.models.sites import Site
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages


@dataclass
class Want:
    """A site and the kinds of observers that are to see its vectors; `seen` holds them afterwards.

    `weights` then gives the weights that read the site, see `reader_weights`; they are read when asked for.
    """

    site: Site
    kinds: tuple[Callable[[int], Any], ...]
    seen: dict[Any, Any] = field(default_factory=dict)
    weights: Callable[[], Iterator[Tensor]] | None = None

    def __post_init__(self) -> None:
        self.seen = {kind: kind(self.site.n) for kind in self.kinds}

    def __call__(self, x: Tensor) -> None:
        for observer in self.seen.values():
            observer(x)


@torch.no_grad()
def measure(
    store: WeightStore,
    plan: FoldPlan,
    wants: Iterable[Want],
    tokens: Tensor,
    progress: Stages | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    offload: Path | None = None,
    blocks: int | None = None,
) -> None:
    """Shows every want the vectors of its site while `tokens`, (samples, length), pass through the original model, or
    through the first of its `blocks`.

    Raises UnsupportedModelError for a site where nothing can be measured.
    """
    graph, model, wants = store.graph, store.skeleton(), list(wants)
    read = Reader(store)
    for want in wants:
        want.weights = partial(reader_weights, read, plan, want.site)
    taps = [tap for want in wants for tap in _taps(graph, plan, want)]
    outer = store.read(graph.outer_params())
    stream = Stream(BlockRunner(model, graph), tokens, outer, dtype, offload, device)
    stream.free_outer()
    with (progress or Stages()).stage("observe", len(graph.blocks) * stream.steps) as advance:
        for i in range(len(graph.blocks[:blocks])):
            tensors = store.read(graph.block_params(i))
            with _listening(model, [tap for tap in taps if tap.op.weight in tensors], tensors):
                stream.run(i, tensors, progress=advance)
    last = [tap for tap in taps if tap.op in graph.outer.linears]
    if last:
        with _listening(model, last, outer):
            stream.observe_head(outer)


@dataclass(frozen=True)
class _Tap:
    """One place where a want listens: what enters (or leaves) a layer, with what changes it into the site's basis."""

    want: Want
    op: LinearOp
    port: Port
    edits: tuple[AbsorbGain | ApplyMap, ...]

    def see(self, tensors: Mapping[str, Tensor]) -> See:
        changes = [_change(edit, tensors) for edit in self.edits]

        def note(expert: int | None, x: Tensor) -> None:
            if self.port.expert not in (None, expert):
                return
            if self.port.axis != self.op.in_axis and self.port.rows is not None:
                x = x.index_select(-1, self.port.rows.to(x.device))
            x = x.float()
            for change in changes:
                x = change(x)
            self.want(x.reshape(-1, self.want.site.n))

        return note


@contextmanager
def _listening(model: Any, taps: list[_Tap], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    undo: list[Callable[[], Any]] = []
    try:
        for tap in taps:
            listen = watch if tap.port.axis == tap.op.in_axis else watch_output
            undo += listen(model, tap.op, tap.see(tensors))
        yield
    finally:
        for step in reversed(undo):
            step()


def _taps(graph: ModelGraph, plan: FoldPlan, want: Want) -> list[_Tap]:
    """Where to listen for a site: at every different input among its readers, once."""
    by_weight = {op.weight: op for group in (*graph.blocks, graph.outer) for op in group.linears}
    found: list[_Tap] = []
    heard = set()
    for port in want.site.readers:
        op = by_weight.get(port.param)
        if op is None:  # a bias: what it adds is heard with what leaves its layer
            continue
        inner = port.axis == op.in_axis
        block = op.module.removeprefix(graph.architecture.blocks + ".").partition(".")[0]
        key = (block, input_key(op, frozenset()), port.expert) if inner else (op.weight, id(port))
        if key not in heard:
            heard.add(key)
            found.append(_Tap(want, op, port, _edits(plan, want.site, port, inner)))
    if not found:
        raise UnsupportedModelError(f"nothing can be measured at {want.site.label}: no layer reads it")
    return found


def _edits(plan: FoldPlan, site: Site, port: Port, inner: bool) -> tuple[AbsorbGain | ApplyMap, ...]:
    """What is planned for the axis of a port, and the gain that will be absorbed there with the map to come."""
    planned = [
        edit
        for edit in plan.edits.get(port.param, ())
        if edit.port.axis == port.axis and edit.port.expert in (None, port.expert) and _meet(edit.port, port)
    ]
    if not inner and planned:
        raise UnsupportedModelError(f"{site.label} cannot be measured behind another map at the same place")
    edits = (*planned, *coming_gains(plan, site, port))
    return tuple(edit for edit in edits if isinstance(edit, AbsorbGain | ApplyMap))


def _meet(one: Port, other: Port) -> bool:
    """Whether two ports of one axis have rows in common."""
    return one.rows is None or other.rows is None or bool(torch.isin(one.rows, other.rows).any())


def _change(edit: AbsorbGain | ApplyMap, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """How the vectors change when a parameter that reads them is edited: the contragredient of the edit."""
    if isinstance(edit, AbsorbGain):
        gain = edit.norm.entry.offset + tensors[edit.norm.gain].float()
        return lambda x: torch.where(gain == 0, 0.0, x / torch.where(gain == 0, 1.0, gain)).to(x)
    back = edit.map.contragredient()
    return lambda x: blocks(back, x.shape[-1]).apply(x)
