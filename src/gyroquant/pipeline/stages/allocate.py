"""Bit allocation: chooses the bits of each layer within the budget of the recipe."""

from __future__ import annotations

from typing import Any

import torch

from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.pipeline.backward import backward_cost, backward_memory
from gyroquant.pipeline.bit_allocation import ALLOCATION, allocate, apply_bits
from gyroquant.pipeline.cost_probe import CostProbe, StageCost, Ticks
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage, shorter_windows
from gyroquant.pipeline.token_weights import TokenWeights, keep
from gyroquant.pipeline.trials import has_gradient_costs
from gyroquant.rounding.bit_allocation import grids_by_bits
from gyroquant.rounding.layers import LayerGroup, round_layers


class Allocate(Stage):
    """Measures the cost of fewer bits in each layer, or row, and chooses the bits.

    Writes `grids`, `row_places`, and `allocation` in the manifest.
    """

    name, journal_key = "allocate", ALLOCATION

    def applies(self, job: Job) -> bool:
        return job.recipe.weights.allocate is not None

    def run(self, context: RunContext) -> None:
        job, state, guided = context.job, context.job.state, context.job.recipe.weights.guided

        def choose() -> dict[str, Any]:
            warnings: list[str] = []
            collected = None if guided is None else TokenWeights(guided, context.journal.folder)
            found = allocate(job, context.progress, warnings.append, collected)
            if collected is not None and collected.windows:  # the same pass gives the weights of these tokens
                keep(job, collected, context.journal, context.progress)
            return {"found": found, "warnings": warnings}

        kept = context.journal.stage(self.journal_key, choose)
        state.warnings += kept["warnings"]
        # The layers themselves hold the width of each row, so the manifest only counts them.
        state.results["allocation"] = {key: value for key, value in kept["found"].items() if key != "row_places"}
        apply_bits(job, kept["found"])

    def memory(self, model: MemoryModel) -> float:
        """Hidden states of the models with one rounded layer and of the unrounded model, one block, and logits."""
        settings = model.recipe.weights.allocate
        assert settings is not None
        inside = sum(op.weight in model.job.targets for group in model.graph.blocks for op in group.linears)
        state = model.length * model.width * model.compute
        tables = [*model.job.tables.values()] if settings.embeddings else []
        if has_gradient_costs(model.job):
            changes = 4 * len(settings.bits) * model.numel(model.block)
            return backward_memory(model, settings.nsamples, changes)
        trials = (inside * len(settings.bits) + len(tables) * len(settings.embeddings)) * settings.nsamples * state
        codes = len(settings.embeddings) * sum(op.numel for op in tables)
        block, largest = model.numel(model.block), max((n * rows for n, rows in model.layer_groups()), default=0)
        copy = 0 if model.compute == 4 else model.compute
        hidden = 0 if model.job.output.offload is not None else model.tokens * model.width * model.compute
        folded, local = model.folded(model.block), copy * block
        working = max(model.activations(model.batch, max(4, model.compute)), model.solving())
        rounding = folded + local + model.second_moments() + working + 2 * 4 * largest + block
        logits = 5 * 4 * model.length * model.graph.config.vocab_size
        around = model.outer_folded + copy * model.outer_numel
        making = block * model.stored + folded + model.folding(model.block)
        tabling = codes + max((16 * op.numel for op in tables), default=0)
        return model.measured_maps + around + trials + hidden + codes + max(rounding, logits, making, tabling)

    def cost(self, probe: CostProbe) -> StageCost:
        if has_gradient_costs(probe.job):
            assert probe.job.tokens is not None
            assert probe.job.recipe.weights.allocate is not None
            windows = min(probe.job.recipe.weights.allocate.nsamples, len(probe.job.tokens))
            return probe.measured(lambda: backward_cost(probe, windows, windows))
        return probe.measured(lambda: _one_layer(probe))

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        return [*super().remedies(job, shortage), shorter_windows(job)]


@torch.no_grad()
def _one_layer(probe: CostProbe) -> tuple[float, int]:
    """Observes the first block, rounds it to one number of bits, runs it with one rounded layer, and runs the head."""
    job, settings, group = probe.job, probe.job.recipe.weights.allocate, probe.job.graph.blocks[0]
    assert settings is not None
    assert job.tokens is not None
    outer = job.plan.read_outer(job.store)
    runner = BlockRunner.of(job.store, job.plan.online)
    stream = Stream(runner, probe.sample, outer, job.compute_dtype, None, job.output.device)
    assert stream.hidden is not None
    tensors, online = job.plan.read_block(job.store, 0), job.plan.online_in(0)
    ticks = Ticks()
    with attached(runner.model, online), observing(runner.model, group, online, stream.observer) as observed:
        stream.observe(0, tensors)
    ticks.tick()
    local, state = stream.local(tensors), stream.hidden[:1].to(stream.device)
    with attached(runner.model, online):
        stream.few(0, local, state, [0])
        ticks.tick()
        grid = grids_by_bits(job.recipe.weights.grid, settings.bits)[max(settings.bits)]
        layers = LayerGroup(group, job.targets, tensors, observed, online)
        solved = round_layers(layers, job.rounding(lambda text: None, grid))
        name, layer = [*solved.items()][-1]
        stream.few(0, local | stream.local({name: layer.merged}), state, [0])
        ticks.tick()
        stream.run(0, tensors)
    ticks.tick()
    del local, tensors, solved, layer, observed, layers
    expected = runner.finish(state, stream.local(outer)).float().log_softmax(-1)
    rounded = runner.finish(state, stream.local(outer)).float().log_softmax(-1)
    (expected.exp() * (expected - rounded)).sum()
    ticks.tick()
    observing_, single, solving, running, heads = (b - a for a, b in zip(ticks.times, ticks.times[1:], strict=False))
    count, blocks = sum(op.weight in job.targets for g in job.graph.blocks for op in g.linears), len(job.graph.blocks)
    trials = (count * len(settings.bits) + 2 * len(job.tables) * len(settings.embeddings)) * settings.nsamples
    seconds = blocks * (probe.scale(stream) * (observing_ + running) + len(settings.bits) * solving)
    seconds += trials * ((blocks + 1) / 2 * single + heads / 2)  # each starts at its own block
    rows = 0 if job.output.offload else job.tokens.numel() - stream.input_ids.numel()
    itemsize = state.element_size()
    return seconds, trials * state.numel() * itemsize + rows * job.graph.hidden * itemsize
