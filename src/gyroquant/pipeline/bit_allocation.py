"""Measures the cost of fewer bits in each layer and table, and chooses the bits of every one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gyroquant.pipeline.job import Job
from gyroquant.pipeline.row_trials import RowTrials, mixed_grid, places_of
from gyroquant.pipeline.sizes import fixed_bytes
from gyroquant.pipeline.token_weights import TokenWeights
from gyroquant.pipeline.trials import GradientTrials, Trials, has_gradient_costs
from gyroquant.rounding.base import Warn
from gyroquant.rounding.bit_allocation import choose
from gyroquant.system.progress import Progress

ALLOCATION = "allocation"
"""The name of the allocated bits in a run's journal."""

_FULL = 0.99  # of the room that an allocation in bytes takes


@torch.no_grad()
def allocate(job: Job, progress: Progress, warn: Warn, collected: TokenWeights | None = None) -> dict[str, Any]:
    """Chooses the bits of every layer for a recipe with `weights.allocate`; returns them with the measured costs.

    With ``costs: measured``, the folded model runs block by block, unrounded, on the calibration text. One model for
    each choice of layer and bits runs beside it on some of the windows, with this layer rounded. Memory holds the
    hidden states of all of them. With ``costs: gradient``, one backward pass takes their place (`GradientTrials`). Its
    windows are added to `collected`. With ``granularity: rows``, rows get bits (`RowTrials`).
    """
    settings = job.recipe.weights.allocate
    assert settings is not None
    trials = _trials(job, warn, collected)
    trials.run(progress)
    costs, sizes = trials.divergences(progress), trials.sizes
    names = {name for name, _ in sizes}
    weights = sum(job.graph.op(name).numel for name in names)
    if settings.bytes is None:
        room = int((settings.budget or 0) * weights)
    else:
        room = 8 * (settings.bytes - fixed_bytes(job, names))
    if isinstance(trials, RowTrials):
        found = trials.choose(costs, room)
        taken = found.pop("taken")
    else:
        found = {"bits": choose(costs, sizes, room)}
        taken = sum(sizes[choice] for choice in found["bits"].items())
    if settings.bytes is not None and taken < _FULL * room:
        warn(
            f"the result takes less than {settings.bytes} bytes, because no layer may have more bits: "
            "put larger ones in weights.allocate.bits and weights.allocate.embeddings"
        )
    divergence: dict[str, dict[str, float]] = {}
    for (name, bits), cost in costs.items():
        divergence.setdefault(name, {})[str(bits)] = cost
    return found | {"per_weight": taken / weights, "divergence": divergence}


def _trials(job: Job, warn: Warn, collected: TokenWeights | None) -> Trials:
    settings = job.recipe.weights.allocate
    if settings is not None and settings.by_rows:
        return RowTrials(job, warn, collected)
    return GradientTrials(job, warn, collected) if has_gradient_costs(job) else Trials(job, warn)


def apply_bits(job: Job, found: Mapping[str, Any]) -> None:
    """Sets the grids in the state of a job, and the widths of rows, to what `allocate` found."""
    places = found.get("row_places", {})
    for name, number in found["bits"].items():
        job.state.grids[name] = mixed_grid(job) if name in places else job.spec.grid(name).at_bits(number)
    job.state.row_places |= {name: places_of(text) for name, text in places.items()}
