"""Where the outliers are: the inputs of a model's linear layers, observed on text, block by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gyroquant.calibration.observers import Key, Moments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.maps import blocks, hadamard
from gyroquant.models.execution.online import OnlineOp, attached
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.graph.model_graph import Group
from gyroquant.models.graph.sites import SITE_OF_BASIS
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Progress


@dataclass(frozen=True)
class Outliers:
    """Statistics of the activations at one site of one block; see `calibration.observers.Moments`.

    `mass` has two numbers for each size b of blocks: MixQuant's bound on the largest entry after Hadamards of size b
    (the largest l1 mass of a block over sqrt(b), arXiv 2601.22347), and that largest entry. Both are divided by the
    token's rms and averaged over tokens.
    """

    site: str
    block: int
    kurtosis: float
    max_over_rms: float
    rms: float
    mass: dict[int, tuple[float, float]] = field(default_factory=dict)


class Spread(Moments):
    """Moments and, for each size of blocks that divides the input, MixQuant's bound and the entry that it bounds."""

    def __init__(self, n: int, sizes: Sequence[int] = ()):
        super().__init__(n)
        self.maps = {size: blocks(hadamard(size), n) for size in sizes if n % size == 0}
        self.masses = {size: torch.zeros(2, dtype=torch.float64) for size in self.maps}
        self.tokens = 0

    def __call__(self, x: Tensor) -> None:
        super().__call__(x)
        x = x.float()
        rms = x.square().mean(1).sqrt().clamp_min(1e-12)
        self.tokens += len(x)
        for size, rotation in self.maps.items():
            bound = x.abs().view(len(x), -1, size).sum(-1).amax(1) / size**0.5
            largest = rotation.apply(x).abs().amax(1)
            self.masses[size] += torch.stack([(bound / rms).sum(), (largest / rms).sum()]).double().cpu()

    @property
    def mass(self) -> dict[int, tuple[float, float]]:
        """Bound and largest entry, for each size of blocks."""
        means = {size: sums / max(1, self.tokens) for size, sums in self.masses.items()}
        return {size: (float(both[0]), float(both[1])) for size, both in means.items()}


class Advice(Protocol):
    """What `measure_outliers` shows the inputs and the parameters of every block to."""

    observer: ClassVar[type[Spread]]
    """The observers of inputs, which it may replace by larger ones."""

    def look(
        self,
        block: int,
        group: Group,
        online: Sequence[OnlineOp],
        observed: Mapping[Key, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Sees a block: its number, its operations, its online operations, the observers, and its parameters."""


@torch.no_grad()
def measure_outliers(
    store: WeightStore,
    input_ids: Tensor,
    device: str = "cpu",
    progress: Progress | None = None,
    sizes: Sequence[int] = (),
    advice: Advice | None = None,
) -> list[Outliers]:
    """The outlier statistics of every observed site and block for `input_ids`, shape (sequences, length).

    `sizes` are the block sizes for which the l1 mass is measured too. `advice` sees the same inputs.
    """
    graph = store.graph
    rows: list[Outliers] = []
    model, make = store.skeleton(), partial(Spread if advice is None else advice.observer, sizes=sizes)
    with evaluating(model), (progress or Progress()).stage("observe", len(graph.blocks)) as advance:
        stream = Stream(BlockRunner.of(store, store.online), input_ids, store.read(graph.outer_params()), device=device)
        stream.free_outer()
        for i, group in enumerate(graph.blocks):
            online = graph.in_block(i, store.online)
            tensors = store.read(graph.block_params(i))
            with attached(model, online), observing(model, group, online, make) as observed:
                stream.run(i, tensors)
            if advice is not None:
                advice.look(i, group, online, observed, tensors)
            rows += _by_site(i, {key: group_basis(group, key) for key, _ in observed}, observed)
            advance()
    return rows


def group_basis(group: Group, key: str) -> str:
    """The basis of an observer's key: the key itself, or, if the key is a weight, the basis that its layer reads."""
    readers = {op.weight: op.entry.reads for op in group.linears}
    return readers.get(key, key).rpartition(".")[2]


def _by_site(block: int, bases: dict[str, str], observed: dict[tuple[str, int | None], Spread]) -> list[Outliers]:
    """One row for each site. Several inputs of one site (experts) are averaged."""
    groups: dict[str, list[Spread]] = defaultdict(list)
    for (key, _), moments in observed.items():
        site = SITE_OF_BASIS.get(bases[key])
        if site:
            groups[site].append(moments)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return [
        Outliers(
            site,
            block,
            mean([m.kurtosis for m in ms]),
            mean([m.max_over_rms for m in ms]),
            mean([m.rms for m in ms]),
            {size: (mean([m.mass[size][0] for m in ms]), mean([m.mass[size][1] for m in ms])) for size in ms[0].mass},
        )
        for site, ms in groups.items()
    ]
