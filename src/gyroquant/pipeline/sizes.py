"""The stored size of a result, from sizes alone, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid, stored_bits
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.packed_description import PackedDescription
from gyroquant.recipes.schema import Recipe
from gyroquant.rounding.bit_allocation import at_bits
from gyroquant.rounding.layers import is_head
from gyroquant.rounding.solvers.rtn import RoundToNearest

_ENTRY = 80  # bytes of an array's entry in the header of a file, besides its name
PRESET_BITS = (2, 3, 4)
"""The bits of our recipes, `gyro-w2` and so on."""


class Sized(Protocol):
    """What sizes need of a job."""

    @property
    def store(self) -> WeightStore: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def graph(self) -> ModelGraph: ...
    @property
    def plan(self) -> FoldPlan: ...
    @property
    def targets(self) -> Mapping[str, LinearOp]: ...
    @property
    def tables(self) -> Mapping[str, LinearOp]: ...
    @property
    def quantizers(self) -> Sequence[OnlineOp]: ...
    @property
    def output(self) -> Any: ...
    @property
    def grids(self) -> Mapping[str, Grid]: ...
    @property
    def spec(self) -> Any: ...


def preset_bits(store: WeightStore, size: int) -> int:
    """The bits of our recipe for a model whose weights shall take `size` bytes: what a weight has on average."""
    average = 8 * size / sum(prod(shape) for shape in store.shapes.values())
    return max((bits for bits in PRESET_BITS if bits <= average), default=min(PRESET_BITS))


def rounded_bits(op: LinearOp, grid: Grid) -> float:
    """The bits of a rounded layer in a basis that needs none itself: codes, scales and zero points."""
    return op.numel * (grid.bits + grid.group_bits / grid.group_of(op.in_features, op.name))


def fixed_bytes(job: Sized, chosen: Collection[str]) -> int:
    """The bytes of all weights of a result but those of `chosen` layers and tables, given by name.

    Counts parameters that are not rounded, a head that is untied, rounded layers whose bits are not chosen, online
    maps, and what files need besides.
    """
    store, graph = job.store, job.graph
    rounded = {**job.targets, **job.tables}
    shapes = dict(store.shapes)
    untied = job.plan.unties(store.read(graph.outer_params()))
    shapes |= {alias: store.shapes[graph.tied[alias]] for alias in untied}
    carried = set(graph.carried)
    plain = [name for name in shapes if name not in rounded]
    each = {name: store.dtype.itemsize if name in carried else job.output.dtype.itemsize for name in plain}
    total = sum(prod(shapes[name]) * each[name] for name in plain)
    total += sum(int(rounded_bits(op, job.spec.grid(name)) / 8) for name, op in rounded.items() if name not in chosen)
    description = PackedDescription()
    for online in (*job.plan.online, *job.quantizers):
        total += stored_bits(description.add_online(online)) // 8
    total += sum(len(name) + _ENTRY for name in plain)
    return total + sum(_arrays(job.spec.grid(name)) * (len(name) + _ENTRY) for name in rounded)


def _arrays(grid: Grid) -> int:
    """The number of arrays that a rounded weight is stored in: codes, scales and perhaps zero points."""
    row = torch.ones(1, max(grid.group_size, 1))
    return len(RoundToNearest().solve(row, grid.with_tensor_scale(row), None).pack())


def check_bytes(job: Sized) -> None:
    """Raises RecipeError if `weights.allocate.bytes` is less than the fewest bits of everything take."""
    settings = job.recipe.weights.allocate
    if settings is None or settings.bytes is None:
        return
    least = {name: rounded_bits(op, at_bits(job.spec.grid(name), low)) for name, op, low in _chosen(job)}
    smallest = fixed_bytes(job, least.keys()) + int(sum(least.values()) / 8) + 1
    if smallest > settings.bytes:
        raise RecipeError(
            f"{settings.bytes / 1e6:.3f} MB are too few for this model and recipe: the smallest that is possible is "
            f"{smallest / 1e6:.3f} MB, of which {fixed_bytes(job, least.keys()) / 1e6:.3f} MB are not rounded. Ask for "
            "that, or add smaller numbers to weights.allocate.bits and weights.allocate.embeddings"
        )


def _chosen(job: Sized) -> Iterator[tuple[str, LinearOp, int]]:
    """The layers and tables whose bits are chosen, and the fewest that each may get."""
    settings = job.recipe.weights.allocate
    assert settings is not None
    outside = {op.weight for op in job.graph.outer.linears}
    for name, op in job.targets.items():
        if name not in outside:
            yield name, op, min(settings.bits)
        elif settings.embeddings and is_head(op):
            yield name, op, min(settings.embeddings)
    if settings.embeddings:
        yield from ((name, op, min(settings.embeddings)) for name, op in job.tables.items())


def expected_bytes(job: Sized) -> int:
    """The size of the result in bytes: codes and scales of the targets, and all else in the output's dtype.

    An upper bound where bits are chosen.
    """
    basis, chosen = job.recipe.weights.basis, job.recipe.weights.allocate
    rounded, bits = 0, 0.0
    for name, op in job.targets.items():
        count, grid = op.numel, job.grids[name]
        order = op.in_features if basis is None else basis.order(op.in_features)
        each = max(chosen.bits) if chosen is not None else grid.bits
        each_group = 0.0 if grid.group_size == -1 else grid.group_bits / grid.group_size
        rounded, bits = rounded + count, bits + count * order / op.in_features * (each + each_group)
        bits += 16 * order if basis is not None and basis.needs_statistics else 0
    for name, op in job.tables.items():
        grid = job.spec.grid(name)
        each = max(grid.bits, *chosen.embeddings) if chosen is not None and chosen.embeddings else grid.bits
        each_group = grid.group_bits / grid.group_of(op.in_features)
        rounded, bits = rounded + op.numel, bits + op.numel * (each + each_group)
    everything = sum(prod(shape) for shape in job.store.shapes.values())
    everything += sum(prod(job.store.shapes[name]) for name in job.graph.tied.values())  # if untied
    bits = rounded * 8 * job.output.dtype.itemsize if job.output.dense else bits
    return int(bits / 8) + (everything - rounded) * job.output.dtype.itemsize
