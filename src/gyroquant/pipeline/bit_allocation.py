"""Measures the cost of fewer bits in each layer and table, and chooses the bits of every one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.sizes import fixed_bytes
from gyroquant.pipeline.tables import round_table, table_statistics
from gyroquant.rounding.base import Warn
from gyroquant.rounding.bit_allocation import Choice, at_bits, choose, grids_by_bits
from gyroquant.rounding.layers import LayerGroup, is_head, round_layers
from gyroquant.system.progress import Progress

ALLOCATION = "allocation"
"""The name of the allocated bits in a run's journal."""

_FULL = 0.99  # of the room that an allocation in bytes takes


@torch.no_grad()
def allocate(job: Job, progress: Progress, warn: Warn) -> dict[str, Any]:
    """Chooses the bits of every layer for a recipe with `weights.allocate`; returns them with the measured costs.

    The folded model runs block by block, unrounded, on the calibration text. One model for each choice of layer and
    bits runs beside it on some of the windows, with this layer rounded. Memory holds the hidden states of all of them.
    """
    settings = job.recipe.weights.allocate
    assert settings is not None
    trials = _Trials(job, warn)
    trials.run(progress)
    costs, sizes = trials.divergences(progress), trials.sizes
    names = {name for name, _ in sizes}
    weights = sum(job.graph.op(name).numel for name in names)
    if settings.bytes is None:
        room = int((settings.budget or 0) * weights)
    else:
        room = 8 * (settings.bytes - fixed_bytes(job, names))
    chosen = choose(costs, sizes, room)
    taken = sum(sizes[choice] for choice in chosen.items())
    if settings.bytes is not None and taken < _FULL * room:
        warn(
            f"the result takes less than {settings.bytes} bytes, because no layer may have more bits: "
            "put larger ones in weights.allocate.bits and weights.allocate.embeddings"
        )
    divergence: dict[str, dict[str, float]] = {}
    for (name, bits), cost in costs.items():
        divergence.setdefault(name, {})[str(bits)] = cost
    return {"bits": chosen, "per_weight": taken / weights, "divergence": divergence}


def apply_bits(job: Job, bits: Mapping[str, int]) -> None:
    """Sets the grids in the state of a job to these bits, given by the name of the layer's weight."""
    job.state.grids |= {name: at_bits(job.spec.grid(name), number) for name, number in bits.items()}


def _around(job: Job) -> AbstractContextManager[None]:
    """The online maps around the blocks attached."""
    return attached(job.store.skeleton(), job.graph.around_blocks(job.plan.online))


class _Trials:
    """Models in which one layer or table is rounded, and their predictions on some windows of the calibration text.

    - ``sizes``: the stored bits of each choice.
    """

    def __init__(self, job: Job, warn: Warn):
        settings = job.recipe.weights.allocate
        assert settings is not None
        assert job.tokens is not None
        self.job, self.warn, self.settings = job, warn, settings
        self.outer = job.plan.read_outer(job.store)
        self.runner = BlockRunner.of(job.store)
        arguments = (job.compute_dtype, job.output.offload, job.output.device)
        self.stream = Stream(self.runner, job.tokens, self.outer, *arguments)
        self.windows = range(min(settings.nsamples, len(job.tokens)))
        self.sizes: dict[Choice, int] = {}
        self._states: dict[Choice, list[Tensor]] = {}  # hidden states with a layer or table rounded
        self._heads: dict[Choice, RoundedLayer] = {}  # rounded heads, and tables that are heads too

    def run(self, progress: Progress) -> None:
        """Runs all of them up to the last block."""
        job, model = self.job, self.job.store.skeleton()
        self._tables()
        with progress.stage("allocate", len(job.graph.blocks)) as advance:
            for index in range(len(job.graph.blocks)):
                with attached(model, job.plan.online_in(index)):
                    self._block(index)
                advance()
        self._round_heads()

    def _tables(self) -> None:
        """Starts the models with a rounded table. It is rounded to nearest: nothing has been observed yet."""
        layers = LayerGroup(self.job.graph.outer, self.job.targets, self.outer, {}, [])
        for name, op in self.job.tables.items() if self.settings.embeddings else ():
            for bits in self.settings.embeddings:
                grid = at_bits(self.job.spec.grid(name), bits)
                rounded = round_table(layers, op, None, grid, self.job.rounding(self.warn))
                self.sizes[name, bits] = rounded.weight.bits
                local = self.stream.local(self.outer | {name: rounded.param})
                ids = [self.stream.input_ids[k : k + 1].to(self.stream.device) for k in self.windows]
                self._states[name, bits] = [self.runner.begin(window, local)[0] for window in ids]

    def _block(self, index: int) -> None:
        stream, job, group = self.stream, self.job, self.job.graph.blocks[index]
        assert stream.hidden is not None
        tensors, online = job.plan.read_block(job.store, index), job.plan.online_in(index)
        with observing(job.store.skeleton(), group, online, stream.observer) as observed:
            stream.observe(index, tensors)
        local = stream.local(tensors)
        for states in self._states.values():
            states[:] = [stream.few(index, local, state, [k]) for k, state in enumerate(states)]
        part = LayerGroup(group, job.targets, tensors, observed, online)
        for bits, grid in grids_by_bits(job.recipe.weights.grid, self.settings.bits).items():
            for name, layer in round_layers(part, job.rounding(self.warn, grid)).items():
                changed = local | stream.local({name: layer.param})
                layer.release()
                inputs = [stream.hidden[k : k + 1].to(stream.device) for k in self.windows]
                self._states[name, bits] = [stream.few(index, changed, state, [k]) for k, state in enumerate(inputs)]
                self.sizes[name, bits] = layer.weight.bits
        stream.run(index, tensors)

    def _round_heads(self) -> None:
        """Rounds the heads, and the tables that are tied to one, on the inputs of the head in the unrounded model."""
        job, group, stream = self.job, self.job.graph.outer, self.stream
        heads = [op for op in group.linears if op.weight in job.targets and is_head(op)]
        if not self.settings.embeddings or not (heads or job.tables):
            return
        with _around(job), observing(job.store.skeleton(), group, [], stream.observer) as observed:
            stream.observe_head(self.outer)
        layers = LayerGroup(group, {op.weight: op for op in heads}, self.outer, observed, [])
        config = job.rounding(self.warn)
        for bits in self.settings.embeddings:
            for name, op in job.tables.items():
                statistics = table_statistics(job.graph, name, layers)
                if statistics is not None:
                    grid = at_bits(job.spec.grid(name), bits)
                    self._heads[name, bits] = round_table(layers, op, statistics, grid, config)
            for op in heads:
                grids = {op.weight: at_bits(job.spec.grid(op.weight), bits)}
                (rounded,) = round_layers(layers, replace(config, others=grids)).values()
                self._heads[op.weight, bits] = rounded
                self.sizes[op.weight, bits] = rounded.weight.bits
        for rounded in self._heads.values():
            rounded.release()

    def divergences(self, progress: Progress) -> dict[Choice, float]:
        """The mean KL divergence, in nats per token, of each one's predictions from those of the unrounded model.

        A table that is also a head has the sum of its two costs.
        """
        assert self.stream.hidden is not None
        local, costs, count = self.stream.local(self.outer), dict.fromkeys(self.sizes, 0.0), len(self.windows)
        total = (len(self._states) + len(self._heads)) * count
        with _around(self.job), progress.stage("allocate: compare predictions", total) as advance:
            for window in self.windows:
                state = self.stream.hidden[window : window + 1].to(self.stream.device)
                expected = self.runner.finish(state, local).float().log_softmax(-1)

                def add(choice: Choice, state: Tensor, weights: Mapping[str, Tensor], expected: Tensor) -> None:
                    predicted = self.runner.finish(state, weights).float().log_softmax(-1)
                    costs[choice] += float(mean_divergence(expected, predicted)) / count
                    advance()

                for choice, states in self._states.items():
                    add(choice, states[window], local, expected)
                for choice, rounded in self._heads.items():
                    changed = local | self.stream.local({choice[0]: rounded.param})
                    rounded.release()
                    add(choice, state, changed, expected)
        return costs
