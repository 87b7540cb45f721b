"""Checks before any work whether the result of a quantization will fit a format."""

from __future__ import annotations

from collections.abc import Iterable

from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named
from gyroquant.grids import Grid
from gyroquant.pipeline.job import Job
from gyroquant.rounding.bit_allocation import grids_by_bits


def check_job(format_name: str, job: Job) -> None:
    """Raises InputError if the result of a quantization would not fit a format, or a package for it is missing."""
    format_ = format_named(format_name)
    check_fit(format_, requirements_of_job(job))
    format_.check_packages()


def requirements_of_job(job: Job) -> ModelRequirements:
    """The requirements of the result of a quantization. If bits are allocated, every possible width counts."""
    weights = job.recipe.weights
    layers: list[Layer] = []
    for name, op in job.targets.items():
        grids: Iterable[Grid] = [job.grids[name]]
        if weights.allocate is not None:
            grids = grids_by_bits(weights.grid, weights.allocate.bits).values()
        plain = weights.basis is None
        layers += [Layer(name, grid, op.in_features, plain, op.entry.stacked) for grid in grids]
    online = (*job.plan.online, *job.quantizers)
    return ModelRequirements(job.graph.config.model_type, tuple(layers), online, job.graph.config)
