"""The size that a recipe gives a model, by part, computed before anything is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gyroquant.models.stores.packed_description import MAPS
from gyroquant.models.stores.weight_bytes import add_up, whole_model_bits, with_total
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.sizes import layer_bytes, map_bytes, plain_bytes, untied_by

_MEASURED = "online maps that are chosen from statistics"


def expected_size(job: Job) -> dict[str, Any]:
    """The expected `per_weight`, `whole_model` and `bytes` of a result, as its manifest will state them.

    `not_counted` names what has no size yet: online maps that methods choose from statistics.
    With bits that are allocated, the layers are expected to fill the budget. Parts of arrays are not padded here, and
    an allocation rarely fills its budget, so a result may differ by a fraction of a percent.
    """
    rounded, maps = dict(_rounded(job)), map_bytes(job)
    plain = plain_bytes(job, untied_by(job))
    bytes_ = add_up(job.graph, [*rounded.items(), *plain.items(), (MAPS, maps)])
    limit = getattr(job.recipe.weights.allocate, "bytes", None)
    if limit is not None:  # of the whole file: the layers get what is left
        free = limit - bytes_["total"]
        bytes_ = with_total(bytes_ | {"layers": bytes_["layers"] + free})
        first = next(iter(job.targets))
        rounded[first] += free
    inside = [op.weight for op in job.graph.block_linears if op.weight in job.targets] or [*job.targets]
    layers = sum(rounded[name] for name in inside)
    return {
        "per_weight": 8 * (layers + maps) / sum(job.targets[name].numel for name in inside),
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
            yield name, layer_bytes(job, op, job.grids[name])
    for name, op in job.tables.items():
        yield name, layer_bytes(job, op, job.grid(name))
