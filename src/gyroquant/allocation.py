"""The station in front of rounding that measures what bits are worth in each layer, and gives them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gyroquant.blockwise import decoded
from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.grids import Grid
from gyroquant.job import Job
from gyroquant.learning.objectives import divergence
from gyroquant.models.fold import fold
from gyroquant.models.online import attached
from gyroquant.models.prove import folded_outer
from gyroquant.models.runner import BlockRunner
from gyroquant.progress import Stages
from gyroquant.rounding.allocate import Choice, choose, grids_by_bits
from gyroquant.rounding.base import Warn
from gyroquant.rounding.stage import Part, round_part

ALLOCATION = "allocation"
"""What a run's journal calls the bits that were given out."""


@torch.no_grad()
def allocate(job: Job, progress: Stages, warn: Warn) -> dict[str, Any]:
    """The bits of every layer, for a recipe that has them chosen, and what was measured for it.

    The folded model runs block by block, unrounded, on the calibration text. Beside it run, on some windows, as many
    models as there are choices, each with one layer rounded: memory holds their hidden states.
    """
    settings = job.recipe.weights.allocate
    assert settings is not None
    assert job.tokens is not None
    grids = grids_by_bits(job.recipe.weights.grid, settings.bits)
    outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
    runner = BlockRunner(job.store.skeleton(), job.graph)
    stream = Stream(runner, job.tokens, outer, job.compute_dtype, job.output.offload, job.output.device)
    trials, sizes = _trials(job, stream, grids, settings.nsamples, progress, warn)
    costs = _divergences(runner, stream, outer, trials, progress)
    inside = {name for name, _ in sizes}
    room = int(settings.budget * sum(_count(job, name) for name in inside))
    chosen = choose(costs, sizes, room)
    taken = sum(sizes[choice] for choice in chosen.items())
    return {
        "bits": chosen,
        "per_weight": taken / sum(_count(job, name) for name in inside),
        "divergence": {name: {str(bits): costs[name, bits] for bits in grids} for name in chosen},
    }


def give(job: Job, bits: Mapping[str, int]) -> None:
    """Puts the grids of these bits, by name of the layer's weight, into the job."""
    settings = job.recipe.weights.allocate
    assert settings is not None
    grids = grids_by_bits(job.recipe.weights.grid, settings.bits)
    job.grids |= {name: grids[number] for name, number in bits.items()}


def _count(job: Job, name: str) -> int:
    return int(torch.Size(job.targets[name].shape).numel())


def _trials(
    job: Job, stream: Stream, grids: Mapping[int, Grid], nsamples: int, progress: Stages, warn: Warn
) -> tuple[dict[Choice, list[Tensor]], dict[Choice, int]]:
    """What leaves the last block when one layer is rounded, window by window, and the size of the layer then."""
    assert stream.hidden is not None
    trials: dict[Choice, list[Tensor]] = {}
    sizes: dict[Choice, int] = {}
    model, windows = job.store.skeleton(), range(min(nsamples, len(stream.hidden)))
    with progress.stage("allocate bits", len(job.graph.blocks)) as advance:
        for index, group in enumerate(job.graph.blocks):
            tensors = fold(job.plan, job.store.read(job.graph.block_params(index)))
            online = job.plan.online_in(index)
            with attached(model, online):
                with observing(model, group, online, stream.observer) as observed:
                    stream.observe(index, tensors)
                local = stream.local(tensors)
                for states in trials.values():
                    states[:] = [stream.few(index, local, state) for state in states]
                part = Part(group, job.targets, tensors, observed, online)
                for bits, grid in grids.items():
                    for name, weight in round_part(part, job.rounding(warn, grid)).items():
                        changed = local | stream.local(decoded(job, {name: weight}))
                        first = [stream.hidden[k : k + 1].to(stream.device) for k in windows]
                        trials[name, bits] = [stream.few(index, changed, state) for state in first]
                        sizes[name, bits] = weight.bits
                stream.run(index, tensors)
            advance()
    return trials, sizes


def _divergences(
    runner: BlockRunner,
    stream: Stream,
    outer: Mapping[str, Tensor],
    trials: Mapping[Choice, list[Tensor]],
    progress: Stages,
) -> dict[Choice, float]:
    """The mean divergence, in nats a token, of each trial's prediction from the unrounded model's."""
    assert stream.hidden is not None
    local, costs = stream.local(outer), dict.fromkeys(trials, 0.0)
    windows = len(next(iter(trials.values())))
    with progress.stage("compare predictions", len(trials) * windows) as advance:
        for window in range(windows):
            state = stream.hidden[window : window + 1].to(stream.device)
            wanted = runner.finish(state, local).float().log_softmax(-1)
            for choice, states in trials.items():
                found = runner.finish(states[window], local).float().log_softmax(-1)
                costs[choice] += float(divergence(wanted, found, None)) / windows
                advance()
    return costs
