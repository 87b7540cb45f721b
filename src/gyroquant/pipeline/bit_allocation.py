"""Measures the cost of fewer bits in each layer, and chooses the bits of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.grids import Grid
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.pipeline.job import Job
from gyroquant.rounding.base import Warn
from gyroquant.rounding.bit_allocation import Choice, choose, grids_by_bits
from gyroquant.rounding.layers import LayerGroup, round_layers
from gyroquant.system.progress import Progress

ALLOCATION = "allocation"
"""The name of the allocated bits in a run's journal."""


@torch.no_grad()
def allocate(job: Job, progress: Progress, warn: Warn) -> dict[str, Any]:
    """Chooses the bits of every layer for a recipe with `weights.allocate`; returns them with the measured costs.

    The folded model runs block by block, unrounded, on the calibration text. One model for each choice of layer and
    bits runs beside it on some of the windows, with this layer rounded. Memory holds the hidden states of all of them.
    """
    settings = job.recipe.weights.allocate
    assert settings is not None
    assert job.tokens is not None
    grids = grids_by_bits(job.recipe.weights.grid, settings.bits)
    outer = job.plan.read_outer(job.store)
    runner = BlockRunner.of(job.store)
    stream = Stream(runner, job.tokens, outer, job.compute_dtype, job.output.offload, job.output.device)
    trials, sizes = _trials(job, stream, grids, settings.nsamples, progress, warn)
    costs = _divergences(runner, stream, outer, trials, progress)
    inside = {name for name, _ in sizes}
    room = int(settings.budget * sum(job.targets[name].numel for name in inside))
    chosen = choose(costs, sizes, room)
    taken = sum(sizes[choice] for choice in chosen.items())
    return {
        "bits": chosen,
        "per_weight": taken / sum(job.targets[name].numel for name in inside),
        "divergence": {name: {str(bits): costs[name, bits] for bits in grids} for name in chosen},
    }


def apply_bits(job: Job, bits: Mapping[str, int]) -> None:
    """Sets the grids in the state of a job to these bits, given by the name of the layer's weight."""
    settings = job.recipe.weights.allocate
    assert settings is not None
    grids = grids_by_bits(job.recipe.weights.grid, settings.bits)
    job.state.grids |= {name: grids[number] for name, number in bits.items()}


def _trials(
    job: Job, stream: Stream, grids: Mapping[int, Grid], nsamples: int, progress: Progress, warn: Warn
) -> tuple[dict[Choice, list[Tensor]], dict[Choice, int]]:
    """For each choice, the last block's output in each window with this layer rounded, and the layer's size in bits."""
    assert stream.hidden is not None
    trials: dict[Choice, list[Tensor]] = {}
    sizes: dict[Choice, int] = {}
    model, windows = job.store.skeleton(), range(min(nsamples, len(stream.hidden)))
    with progress.stage("allocate", len(job.graph.blocks)) as advance:
        for index, group in enumerate(job.graph.blocks):
            tensors = job.plan.read_block(job.store, index)
            online = job.plan.online_in(index)
            with attached(model, online):
                with observing(model, group, online, stream.observer) as observed:
                    stream.observe(index, tensors)
                local = stream.local(tensors)
                for states in trials.values():
                    states[:] = [stream.few(index, local, state, [k]) for k, state in enumerate(states)]
                part = LayerGroup(group, job.targets, tensors, observed, online)
                for bits, grid in grids.items():
                    for name, layer in round_layers(part, job.rounding(warn, grid)).items():
                        changed = local | stream.local({name: layer.param})
                        layer.release()
                        inputs = [stream.hidden[k : k + 1].to(stream.device) for k in windows]
                        trials[name, bits] = [stream.few(index, changed, state, [k]) for k, state in enumerate(inputs)]
                        sizes[name, bits] = layer.weight.bits
                stream.run(index, tensors)
            advance()
    return trials, sizes


def _divergences(
    runner: BlockRunner,
    stream: Stream,
    outer: Mapping[str, Tensor],
    trials: Mapping[Choice, list[Tensor]],
    progress: Progress,
) -> dict[Choice, float]:
    """The mean KL divergence, in nats per token, of each trial's predictions from those of the unrounded model."""
    assert stream.hidden is not None
    local, costs = stream.local(outer), dict.fromkeys(trials, 0.0)
    windows = len(next(iter(trials.values())))
    with progress.stage("allocate: compare predictions", len(trials) * windows) as advance:
        for window in range(windows):
            state = stream.hidden[window : window + 1].to(stream.device)
            expected = runner.finish(state, local).float().log_softmax(-1)
            for choice, states in trials.items():
                rounded = runner.finish(states[window], local).float().log_softmax(-1)
                costs[choice] += float(mean_divergence(expected, rounded)) / windows
                advance()
    return costs
