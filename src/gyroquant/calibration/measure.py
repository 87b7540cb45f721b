"""Statistics for methods: the original model runs once over the text, and observers see the vectors at chosen sites.

They see them in the basis that a site has after all maps planned so far. So a method sees the vectors that its map will
act on.
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

from gyroquant.calibration.attention_observers import AttentionObserver, watching_attention
from gyroquant.calibration.observers import See, input_key, watch, watch_output
from gyroquant.calibration.site_weights import Reader, coming_gains, reader_weights
from gyroquant.calibration.stream import Stream
from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import blocks
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import AbsorbGain, ApplyMap, FoldPlan
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph, Port
from gyroquant.models.graph.sites import Site, attention_module
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Progress


@dataclass
class SiteMeasurement:
    """A site and the kinds of observers for its vectors. After `measure`, `seen` has the observers by kind.

    `weights` then returns the weights that read the site, see `reader_weights`. They are read from disk when it is
    called.
    """

    site: Site
    kinds: tuple[Callable[[int], Any], ...]
    seen: dict[Any, Any] = field(default_factory=dict)
    weights: Callable[[], Iterator[Tensor]] | None = None

    def __post_init__(self) -> None:
        self.seen = {kind: kind(self.site.n) for kind in self.kinds}

    @property
    def sees_attention(self) -> bool:
        """Whether it sees queries, keys and values in place of the vectors of its site."""
        return any(isinstance(observer, AttentionObserver) for observer in self.seen.values())

    def __call__(self, x: Tensor) -> None:
        for observer in self.seen.values():
            observer(x)


@torch.no_grad()
def measure(
    store: WeightStore,
    plan: FoldPlan,
    wants: Iterable[SiteMeasurement],
    tokens: Tensor,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    offload: Path | None = None,
    blocks: int | None = None,
) -> None:
    """Runs `tokens`, shape (samples, length), through the original model and fills every measurement in `wants`.

    With `blocks`, only as many blocks run. Raises UnsupportedModelError for a site at which nothing can be measured.
    """
    graph, model, measurements = store.graph, store.skeleton(), list(wants)
    read = Reader(store)
    for measurement in measurements:
        measurement.weights = partial(reader_weights, read, plan, measurement.site)
    of_attention = [measurement for measurement in measurements if measurement.sees_attention]
    others = [measurement for measurement in measurements if not measurement.sees_attention]
    probes = [probe for measurement in others for probe in _probes(graph, plan, measurement)]
    watched = [_watched(graph, plan, of_attention, i) for i in range(len(graph.blocks))]
    outer = store.read(graph.outer_params())
    stream = Stream(BlockRunner.of(store), tokens, outer, dtype, offload, device)
    stream.free_outer()
    with (progress or Progress()).stage("measure", len(graph.blocks) * stream.steps) as advance:
        for i in range(len(graph.blocks[:blocks])):
            tensors = store.read(graph.block_params(i))
            here = [probe for probe in probes if probe.op.weight in tensors]
            with _probing(model, here, tensors), watching_attention(model, watched[i]):
                stream.run(i, tensors, progress=advance)
    last = [probe for probe in probes if probe.op in graph.outer.linears]
    if last:
        with _probing(model, last, outer):
            stream.observe_head(outer)


@dataclass(frozen=True)
class _Probe:
    """One layer whose input (or output) a measurement sees, and the edits that bring it into the site's basis."""

    measurement: SiteMeasurement
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
            self.measurement(x.reshape(-1, self.measurement.site.n))

        return note


def _watched(
    graph: ModelGraph, plan: FoldPlan, measurements: list[SiteMeasurement], block: int
) -> dict[str, list[AttentionObserver]]:
    """The observers of a block's attention, by the name of its module."""
    sites = [measurement.site for measurement in measurements if measurement.site.block == block]
    module = attention_module(graph.blocks[block])
    for site in sites:
        if module is None:
            raise UnsupportedModelError(
                f"nothing can be measured at {site.label}, whose attention is not described: choose a method that "
                "does not measure"
            )
        before = ("R3", "qk") if site.name == "R3" else (site.name,)
        if any(other.block == block and other.name in before for other, _, _ in plan.folded):
            raise UnsupportedModelError(
                f"{site.label} cannot be measured after another map of {' or '.join(before)}: put the method that "
                "measures first"
            )
    found = [
        one for measurement in measurements if measurement.site.block == block for one in measurement.seen.values()
    ]
    observers = [observer for observer in found if isinstance(observer, AttentionObserver)]
    return {module: observers} if module is not None and observers else {}


@contextmanager
def _probing(model: Any, probes: list[_Probe], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    undo: list[Callable[[], Any]] = []
    try:
        for probe in probes:
            listen = watch if probe.port.axis == probe.op.in_axis else watch_output
            undo += listen(model, probe.op, probe.see(tensors))
        yield
    finally:
        for step in reversed(undo):
            step()


def _probes(graph: ModelGraph, plan: FoldPlan, measurement: SiteMeasurement) -> list[_Probe]:
    """The probes for a site: one at every different input among its readers."""
    site = measurement.site
    probes: list[_Probe] = []
    seen = set()
    for port in site.readers:
        op = graph.find_op(port.param)
        if op is None:  # a bias: it is part of the output of its layer, which another port has
            continue
        inner = port.axis == op.in_axis
        key = (graph.block_of(op.module), input_key(op, frozenset()), port.expert) if inner else (op.weight, id(port))
        if key not in seen:
            seen.add(key)
            probes.append(_Probe(measurement, op, port, _edits(plan, site, port, inner)))
    if not probes:
        raise UnsupportedModelError(
            f"nothing can be measured at {site.label}, because no layer reads it: choose a method that does not measure"
        )
    return probes


def _edits(plan: FoldPlan, site: Site, port: Port, inner: bool) -> tuple[AbsorbGain | ApplyMap, ...]:
    """The edits planned for the axis of a port, and the gain that the next map will absorb there."""
    planned = [
        edit
        for edit in plan.edits.get(port.param, ())
        if edit.port.axis == port.axis and edit.port.expert in (None, port.expert) and _overlap(edit.port, port)
    ]
    if not inner and planned:
        raise UnsupportedModelError(
            f"{site.label} cannot be measured after another map at the same site: put the method that measures first"
        )
    edits = (*planned, *coming_gains(plan, site, port))
    return tuple(edit for edit in edits if isinstance(edit, AbsorbGain | ApplyMap))


def _overlap(first: Port, second: Port) -> bool:
    """Whether two ports on the same axis have rows in common."""
    return first.rows is None or second.rows is None or bool(torch.isin(first.rows, second.rows).any())


def _change(edit: AbsorbGain | ApplyMap, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """How vectors change when a parameter that reads them is edited: by the contragredient of the edit."""
    if isinstance(edit, AbsorbGain):
        gain = edit.norm.entry.offset + tensors[edit.norm.gain].float()
        return lambda x: torch.where(gain == 0, 0.0, x / torch.where(gain == 0, 1.0, gain)).to(x)
    back = edit.map.contragredient()
    return lambda x: blocks(back, x.shape[-1]).apply(x)
