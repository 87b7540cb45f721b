"""Checks before any work whether the result of a quantization will fit a format."""

from __future__ import annotations

from collections.abc import Iterable

from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named
from gyroquant.grids import Grid
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.row_trials import mixed_grid
from gyroquant.rounding.bit_allocation import grids_by_bits
from gyroquant.rounding.layers import is_head


def check_job(format_name: str, job: Job) -> None:
    """Raises InputError if the result of a quantization would not fit a format, or a package for it is missing."""
    format_ = format_named(format_name)
    check_fit(format_, requirements_of_job(job))
    format_.check_packages()


def requirements_of_job(job: Job) -> ModelRequirements:
    """The requirements of the result of a quantization. If bits are allocated, every possible width counts."""
    plain, branch = job.recipe.weights.basis is None, job.recipe.weights.low_rank is not None
    layers = [
        Layer(name, grid, op.in_features, plain, op.entry.stacked, table=name in job.tables, low_rank=branch)
        for name, op in {**job.targets, **job.tables}.items()
        for grid in dict.fromkeys(grid.for_columns(op.in_features) for grid in _grids(job, name, op))
    ]
    online = (*job.plan.online, *job.quantizers)
    return ModelRequirements(job.graph.config.model_type, tuple(layers), online, job.graph.config, job.graph)


def _grids(job: Job, name: str, op: LinearOp) -> Iterable[Grid]:
    """Every grid that a layer or a table may get."""
    grid, chosen = job.spec.grid(name), job.recipe.weights.allocate
    if chosen is None:
        return [grid]
    around = name in job.tables or is_head(op)
    if chosen.by_rows and not around:
        return [mixed_grid(job)]
    return grids_by_bits(grid, chosen.embeddings if around else chosen.bits).values() or [grid]
