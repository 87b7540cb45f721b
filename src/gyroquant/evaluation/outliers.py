"""Where the outliers are: the inputs of a model's linear layers, observed on text, block by block."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from gyroquant.calibration.observers import Moments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.models.online import attached
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages

SITE_OF_BASIS = {"residual": "R1", "attn_in": "attn_in", "mlp_in": "mlp_in", "attn_out": "R2", "act": "R4"}


@dataclass(frozen=True)
class Outliers:
    """Figures of the activations at one site of one block; see `calibration.observers.Moments`."""

    site: str
    block: int
    kurtosis: float
    max_over_rms: float
    rms: float


@torch.no_grad()
def measure_outliers(
    store: WeightStore, input_ids: Tensor, device: str = "cpu", progress: Stages | None = None
) -> list[Outliers]:
    """The outlier figures of every observed site and block for `input_ids`, shape (sequences, length)."""
    graph = store.graph
    found: list[Outliers] = []
    model = store.skeleton()
    with evaluating(model), (progress or Stages()).stage("observe", len(graph.blocks)) as advance:
        runner = BlockRunner(model, graph)
        stream = Stream(runner, input_ids, store.read(graph.outer_params()), device=device)
        stream.free_outer()
        for i, group in enumerate(graph.blocks):
            online = graph.in_block(i, store.online)
            with attached(model, online), observing(model, group, online, Moments) as observed:
                stream.run(i, store.read(graph.block_params(i)))
            found += _by_site(i, {key: group_basis(group, key) for key, _ in observed}, observed)
            advance()
    return found


def group_basis(group: object, key: str) -> str:
    """The basis that an observer's key stands for: the key itself, or what the layer of that weight reads."""
    readers = {op.weight: op.entry.reads for op in group.linears}  # type: ignore[attr-defined]
    return readers.get(key, key).rpartition(".")[2]


def _by_site(block: int, bases: dict[str, str], observed: dict[tuple[str, int | None], Moments]) -> list[Outliers]:
    """One row a site; several inputs of one site (experts) are averaged."""
    groups: dict[str, list[Moments]] = defaultdict(list)
    for (key, _), moments in observed.items():
        site = SITE_OF_BASIS.get(bases[key])
        if site:
            groups[site].append(moments)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return [
        Outliers(
            site, block, mean([m.kurtosis for m in ms]), mean([m.max_over_rms for m in ms]), mean([m.rms for m in ms])
        )
        for site, ms in groups.items()
    ]
