"""The stored size of a result, from sizes alone, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Grid, stored_bits
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.packed_description import PackedDescription
from gyroquant.recipes.schema import Recipe
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


def layer_bytes(job: Sized, op: LinearOp, grid: Grid) -> int:
    """The bytes of a rounded layer or table: codes, scales, zero points, its low-rank branch, what its basis needs."""
    basis = job.recipe.weights.basis
    columns = op.in_features if basis is None else basis.order(op.in_features)
    grid = grid.for_columns(columns)
    groups = 1 if grid.group_size == -1 else columns / grid.group_size
    row = columns * grid.code_bits + groups * grid.group_bits + grid.row_bits
    bits = op.numel // op.in_features * row + grid.tensor_bits
    scales = 16 * columns if basis is not None and basis.needs_statistics else 0
    return int((bits + scales + job.recipe.weights.low_rank_bits(op)) / 8)


def plain_bytes(job: Sized, untied: Collection[str]) -> dict[str, int]:
    """The bytes of every parameter that is not rounded, heads that the maps untie included."""
    store, tied = job.store, job.graph.tied
    shapes = {**store.shapes, **{name: store.shapes[tied[name]] for name in untied}}
    carried, rounded = set(job.graph.carried), job.targets.keys() | job.tables.keys()
    sizes = {name: store.dtype.itemsize if name in carried else job.output.dtype.itemsize for name in shapes}
    return {name: prod(shape) * sizes[name] for name, shape in shapes.items() if name not in rounded}


def untied_by(job: Sized) -> tuple[str, ...]:
    """The tied parameters that the maps untie. Reads the parameters around the blocks."""
    return job.plan.unties(job.store.read(job.graph.outer_params()))


def map_bytes(job: Sized) -> int:
    """The bytes of the online maps. Those that are measured and not chosen yet have placeholders without size."""
    description, arrays = PackedDescription(), dict[str, torch.Tensor]()
    for online in (*job.plan.online, *job.quantizers):
        arrays |= description.add_online(online)
    return stored_bits(arrays) // 8


def fixed_bytes(job: Sized, chosen: Collection[str]) -> int:
    """The bytes of all weights of a result but those of `chosen` layers and tables, given by name.

    Counts parameters that are not rounded, a head that is untied, rounded layers whose bits are not chosen, online
    maps, and what files need besides.
    """
    rounded, plain = {**job.targets, **job.tables}, plain_bytes(job, untied_by(job))
    others = [layer_bytes(job, op, job.spec.grid(name)) for name, op in rounded.items() if name not in chosen]
    entries, factors = sum(len(name) + _ENTRY for name in plain), 0 if job.recipe.weights.low_rank is None else 2
    grids = {name: job.spec.grid(name) for name in rounded}
    arrays = {text: _arrays(grid) + factors for text, grid in {repr(grid): grid for grid in grids.values()}.items()}
    entries += sum(arrays[repr(grid)] * (len(name) + _ENTRY) for name, grid in grids.items())
    entries += sum(len(name) + _ENTRY for name in chosen if _row_bits(job, name))
    return sum(plain.values()) + sum(others) + map_bytes(job) + entries


def _row_bits(job: Sized, name: str) -> int:
    """The bits for each row of a layer that say how many bits its codes have; 0 where all rows have the same."""
    settings = job.recipe.weights.allocate
    if settings is None or not settings.by_rows or name not in {op.weight for op in job.graph.block_linears}:
        return 0
    return (len(set(settings.bits)) - 1).bit_length()


def _arrays(grid: Grid) -> int:
    """The number of arrays that a rounded weight is stored in: codes, scales and perhaps zero points."""
    tile = torch.ones(grid.tile_rows, max(grid.group_size * grid.super_block, grid.tile_columns))
    return len(RoundToNearest().solve(tile, grid.with_tensor_scale(tile), None).pack())


def check_bytes(job: Sized) -> None:
    """Raises RecipeError if `weights.allocate.bytes` is less than the fewest bits of everything take.

    Raises InputError for plain output, whose size does not depend on the bits.
    """
    settings = job.recipe.weights.allocate
    if settings is None or settings.bytes is None:
        return
    if job.output.dense:
        raise InputError("--dense writes plain numbers, whose size no bits change: leave out --dense, or --size")
    smallest, fixed = smallest_bytes(job)
    if smallest > settings.bytes:
        raise RecipeError(
            f"{settings.bytes / 1e6:.3f} MB are too few for this model and recipe: the smallest that is possible is "
            f"{smallest / 1e6:.3f} MB, of which {fixed / 1e6:.3f} MB have no bits to choose. Ask for that, or add "
            "smaller numbers to weights.allocate.bits and weights.allocate.embeddings"
        )


def smallest_bytes(job: Sized) -> tuple[int, int]:
    """The fewest bytes that a result can have, and how many of them have no bits to choose.

    Without `weights.allocate.bytes` no bits are chosen: the two are the same.
    """
    least = {
        name: layer_bytes(job, op, job.spec.grid(name).at_bits(low)) + -(-_row_bits(job, name) * op.out_features // 8)
        for name, op, low in _chosen(job)
    }
    fixed = fixed_bytes(job, least.keys())
    return fixed + sum(least.values()) + 1, fixed


def _chosen(job: Sized) -> Iterator[tuple[str, LinearOp, int]]:
    """The layers and tables whose bits are chosen, and the fewest that each may get."""
    settings = job.recipe.weights.allocate
    if settings is None or settings.bytes is None:
        return
    outside = {op.weight for op in job.graph.outer.linears}
    for name, op in job.targets.items():
        if name not in outside:
            yield name, op, min(settings.bits)
        elif settings.embeddings and is_head(op):
            yield name, op, min(settings.embeddings)
    if settings.embeddings:
        yield from ((name, op, min(settings.embeddings)) for name, op in job.tables.items())


def expected_bytes(job: Sized) -> int:
    """The largest size that a result can have, in bytes: every head untied, the most bits where they are chosen."""
    chosen, around = job.recipe.weights.allocate, {op.weight for op in job.graph.outer.linears}
    rounded = {**job.targets, **job.tables}
    total = sum(plain_bytes(job, job.graph.tied.keys() - rounded.keys()).values()) + map_bytes(job)
    for name, op in rounded.items():
        grid = job.spec.grid(name)
        if chosen is not None:
            outside = name in job.tables or name in around
            grid = grid.at_bits(max(chosen.embeddings or (grid.bits,)) if outside else max(chosen.bits))
        total += op.numel * job.output.dtype.itemsize if job.output.dense else layer_bytes(job, op, grid)
    return int(total)
