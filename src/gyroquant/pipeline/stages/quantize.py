"""Calibrates, rounds and journals the blocks and the head, one by one or several in parallel."""

from __future__ import annotations

import time
from dataclasses import replace

from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.online import attached
from gyroquant.pipeline.cost_probe import CostProbe, StageCost, Ticks
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel, most_workers
from gyroquant.pipeline.parallel_blocks import quantize_blocks_in_parallel
from gyroquant.pipeline.quantize_block import apply_steps, kept_bytes, quantize_block
from gyroquant.pipeline.quantize_model import quantize_model
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage, less_hidden
from gyroquant.rounding.steps.base import RoundedBlock
from gyroquant.system.environment import available_memory
from gyroquant.system.worker_pool import SLACK


class Quantize(Stage):
    """Rounds every layer. Writes the means of keys in `quantizers`, and `layers` in the manifest. The journal keeps
    every finished block.
    """

    name, journal_key = "quantize", "block"

    def run(self, context: RunContext) -> None:
        job, journal, progress = context.job, context.journal, context.progress
        writer = context.writer
        if job.output.workers is not None:
            quantize_blocks_in_parallel(job, journal, job.output.workers, progress)
        job.state.results["layers"] = quantize_model(job, writer, journal, progress, job.state.warnings)

    def memory(self, model: MemoryModel) -> float:
        alone = model.job.output.workers is None
        return model.measured_maps + (_one_process(model) if alone else _in_parallel(model))

    def cost(self, probe: CostProbe) -> StageCost:
        stream = probe.stream  # made before the peak is reset: its memory counts for the stage `save`

        def part() -> tuple[float, int]:
            seconds = len(probe.job.graph.blocks) * _first_block(probe, stream)
            return seconds, probe.missing_hidden(stream)

        return probe.measured(part)

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        if job.output.workers is None:
            return super().remedies(job, shortage)
        held = 0 if job.output.offload is not None else 2 * shortage.hidden_bytes  # of this process and of a worker
        return [
            *less_hidden(job, shortage, held),
            "round one block after the other, without --workers and --ray",
        ]


def _one_process(model: MemoryModel) -> int:
    """Bytes to fold, observe and round a block. Its decoded layers are held until the text has run through it."""
    block, weights = model.numel(model.block), model.recipe.weights
    rounded = sum(model.numel_of(name) for name in model.block if name in model.job.targets)
    folded, making = model.folded(model.block), model.making_block()
    codes, decoded = rounded, 4 * rounded
    if not model.job.needs_stream:
        return max(making, folded + codes + max(decoded, model.solving()))
    local = block * model.compute if folded != block * model.compute else 0
    models = 2 if weights.needs_original else 1
    turns = decoded if weights.observes_in_turn else 0
    inputs = (max if weights.observes_in_turn else sum)(n for n, _ in model.layer_groups())
    kept = kept_bytes(model.job, model.largest)
    waiting = model.compute * model.batch * inputs if weights.needs_input_error else 0
    running = models * local + model.activations(model.batch, max(4, model.compute)) + waiting
    deployed = 2 * decoded + local
    tuned = max((step.held_bytes(rounded) for step in weights.block_steps), default=0)
    held = folded + codes + turns + kept + model.second_moments()
    return model.in_memory + max(
        making,
        held + running,
        held + model.solving(),
        folded + codes + kept + deployed + tuned + model.activations(model.batch, model.compute),
    )


def _first_process(model: MemoryModel) -> int:
    """Bytes of the main process, which carries the text through the unrounded blocks and starts workers."""
    block, folded = model.numel(model.block), model.folded(model.block)
    running = folded + block * model.compute + model.activations(model.batch, max(4, model.compute))
    return model.in_memory + max(model.making_outer, model.making_block(), running if model.job.needs_stream else 0)


def _in_parallel(model: MemoryModel) -> int:
    """Bytes of the main process and its workers. Each worker holds the base memory of this process, all hidden states,
    and the data of one block.
    """
    first = _first_process(model)
    working = max(model.in_memory + model.making_outer, _one_process(model))
    each = model.base + model.measured_maps + working
    return first + _workers_at_once(model.job, first, each) * each


def _workers_at_once(job: Job, first: float, each: float) -> int:
    """How many workers of `each` bytes run at once on this machine, beside a main process of `first` bytes.

    `LocalPool` starts as many of the requested workers as fit, and at least one. Ray on this machine starts all
    requested workers, because it does not check memory. Workers of a remote cluster are not counted.
    """
    workers = job.output.workers
    if workers is None or workers.ray not in (None, "local"):
        return 0
    most = most_workers(job)
    room = available_memory() - first
    return most if workers.ray else max(1, min(most, int(room // (each * SLACK))))


def _first_block(probe: CostProbe, sample: Stream | None) -> float:
    """Seconds for one block: reading, folding, calibrating, rounding, tuning, the forward pass and packing.

    Also sets `probe.forward_seconds`, the seconds for one sequence.
    """
    job = probe.job
    model, started = job.store.skeleton(), time.perf_counter()
    tensors = job.plan.read_block(job.store, 0)
    reading = time.perf_counter() - started
    started = time.perf_counter()
    running, steps = sample if job.needs_stream else None, job.recipe.weights.block_steps
    block, _ = quantize_block(job, 0, tensors, running, lambda: None, [], [s for s in steps if not s.iterations])
    whole, observed = time.perf_counter() - started, 0.0 if running is None else running.observing_seconds
    tuning = _tuning(job, block)
    forward = 0.0
    if sample:
        started = time.perf_counter()
        with attached(model, [*job.running_in(0), *block.branches]):
            sample.run(0, block.deployed)
        forward = time.perf_counter() - started
        probe.forward_seconds = forward / len(sample.input_ids)
    started = time.perf_counter()
    for layer in block.layers.values():
        layer.weight.pack()
    reading += time.perf_counter() - started
    passes = int(job.needs_stream) + int(job.centers_keys) + sum(step.passes for step in steps)
    solving = whole - observed
    return reading + solving + tuning + probe.scale(sample) * (observed + passes * forward)


def _tuning(job: Job, block: RoundedBlock) -> float:
    """Seconds of the steps with iterations for one block, estimated from two iterations of each."""
    seconds = 0.0
    for step in job.recipe.weights.block_steps:
        if step.iterations:
            ticks = Ticks()
            apply_steps(job, replace(block, progress=ticks.tick), [step.with_iterations(2)])
            each, rest = (ticks.times[2] - ticks.times[0]) / 2, time.perf_counter() - ticks.times[2]
            seconds += step.iterations * each + rest
    return seconds
