"""The size that a recipe gives a model, by part, computed before anything is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from gyroquant.grids import Grid, stored_bits
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed_description import MAPS, PackedDescription
from gyroquant.models.stores.weight_bytes import add_up, whole_model_bits, with_total
from gyroquant.pipeline.job import Job

_MEASURED = "online maps that are chosen from statistics"


def expected_size(job: Job) -> dict[str, Any]:
    """The expected `per_weight`, `whole_model` and `bytes` of a result, as its manifest will state them.

    `not_counted` names what has no size yet: online maps that methods choose from statistics.
    With bits that are allocated, the layers are expected to fill the budget. Parts of arrays are not padded here, and
    an allocation rarely fills its budget, so a result may differ by a fraction of a percent.
    """
    rounded = dict(_rounded(job))
    maps = _map_bytes(job)
    bytes_ = add_up(job.graph, [*rounded.items(), *_plain(job, set(rounded)), (MAPS, maps)])
    limit = getattr(job.recipe.weights.allocate, "bytes", None)
    if limit is not None:  # of the whole file: the layers get what is left
        free = limit - bytes_["total"]
        bytes_ = with_total(bytes_ | {"layers": bytes_["layers"] + free})
        first = next(iter(job.targets))
        rounded[first] += free
    layers = sum(size for name, size in rounded.items() if name in job.targets)
    return {
        "per_weight": 8 * (layers + maps) / sum(op.numel for op in job.targets.values()),
        "whole_model": whole_model_bits(bytes_, job.store.weights),
        "bytes": bytes_,
        "not_counted": [_MEASURED] if job.recipe.measures and job.plan.online else [],
    }


def _rounded(job: Job) -> Iterator[tuple[str, int]]:
    """The bytes of every layer and table that is rounded."""
    inside = {op.weight for op in job.graph.block_linears}
    budget = None if job.recipe.weights.allocate is None else job.recipe.weights.allocate.budget
    for name, op in job.targets.items():
        if budget is not None and name in inside:
            yield name, int(op.numel * budget / 8)
        else:
            yield name, _in_basis(job, op, job.grids[name])
    for name, op in job.tables.items():
        assert job.recipe.embeddings is not None
        yield name, int(_bits(op, job.recipe.embeddings.grid, op.in_features) / 8)


def _bits(op: LinearOp, grid: Grid, columns: int) -> float:
    """The bits of codes, scales and zero points of a layer that is rounded with this number of columns."""
    rows = op.numel // op.in_features
    groups = 1 if grid.group_size == -1 else columns / grid.group_size
    return rows * (columns * grid.bits + groups * grid.group_bits) + grid.tensor_bits


def _in_basis(job: Job, op: LinearOp, grid: Grid) -> int:
    """The bytes of a layer, in the basis of the recipe if there is one."""
    basis = job.recipe.weights.basis
    columns = op.in_features if basis is None else basis.order(op.in_features)
    scales = 16 * columns if basis is not None and basis.needs_statistics else 0
    return int((_bits(op, grid, columns) + scales) / 8)


def _plain(job: Job, rounded: set[str]) -> Iterator[tuple[str, int]]:
    """The bytes of every parameter that is not rounded. A head that the maps untie is one of them."""
    store, graph = job.store, job.graph
    untied = job.plan.unties(store.read(graph.outer_params()))
    shapes = {**store.shapes, **{name: store.shapes[graph.tied[name]] for name in untied}}
    carried = set(graph.carried)
    for name, shape in shapes.items():
        if name not in rounded:
            each = store.dtype.itemsize if name in carried else job.output.dtype.itemsize
            yield name, prod(shape) * each


def _map_bytes(job: Job) -> int:
    """The bytes of the online maps. Those that are measured are not chosen yet and have placeholders without size."""
    description, arrays = PackedDescription(), dict[str, Any]()
    for op in (*job.plan.online, *job.quantizers):
        arrays |= description.add_online(op)
    return stored_bits(arrays) // 8


__all__ = ["expected_size"]
