"""How long a quantization will take and how much memory it will need, measured on its first block and first steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from gyroquant.blockwise import round_block, tune_rounded
from gyroquant.calibration.stream import Stream
from gyroquant.environment import peak_memory_bytes, steady_memory
from gyroquant.grids import QuantizedWeight
from gyroquant.job import Job, expected_bytes, learning_setting
from gyroquant.learning.learn import begin
from gyroquant.models.fold import fold
from gyroquant.models.online import attached
from gyroquant.models.prove import folded_outer, prove
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.pipeline import proof_sample
from gyroquant.planning import measuring_passes
from gyroquant.progress import Stages

_BATCHES = 2  # batches of calibration text that the first block is measured on


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of a whole run; `disk_bytes` is the size of the result."""

    seconds: float
    peak_memory_bytes: int
    disk_bytes: int


@torch.no_grad()
def predict(job: Job) -> Prediction:
    """Runs the stations on one block and some of the text, and scales up what grows with blocks, tokens and steps.

    What methods take to choose their maps from what was measured is not counted, nor is a solver from outside.
    """
    steady_memory()
    with evaluating(job.store.skeleton()):
        seconds = _proving(job) + _learning(job)
        outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
        runner = BlockRunner(job.store.skeleton(), job.graph)
        stream = _short_stream(job, runner, outer)
        rounding, solving, forward = _rounding(job, stream)
        seconds += len(job.graph.blocks) * rounding
        memory = _missing_hidden(job, stream)
        if job.recipe.weights.allocate is not None and stream is not None:
            trying, trials = _allocating(job, stream, runner, outer)
            seconds += trying + len(job.graph.blocks) * len(job.recipe.weights.allocate.bits) * solving
            memory = max(memory, trials)
        if job.recipe.finish is not None and stream is not None:
            finishing, states = _finishing(job, stream, runner, outer, forward)
            seconds, memory = seconds + finishing, max(memory, states)
    return Prediction(seconds, peak_memory_bytes() + memory, expected_bytes(job))


def _proving(job: Job) -> float:
    """Seconds that the proof takes."""
    if not (job.plan.edits or job.plan.online):
        return 0.0
    sample, started = proof_sample(job), time.perf_counter()
    prove(job.store, job.plan, BlockRunner(job.store.skeleton(), job.graph), sample[:1], threshold=float("inf"))
    return (time.perf_counter() - started) * len(sample)


def _learning(job: Job) -> float:
    """Seconds that learning takes: steps on one sequence and on two tell what a step and what a sequence costs.

    Before its first step, kurtosis looks at the whole text.
    """
    learn = job.recipe.learn
    if learn is None:
        return 0.0
    tokens = None if job.tokens is None else job.tokens[:2]
    setting = learning_setting(job.recipe, tokens, job.targets, job.quantizers, job.compute_dtype)
    times, started = [], time.perf_counter()
    with torch.enable_grad():
        _, _, values, loss = begin(job.store, job.plan, learn, setting, Stages())
        looking = time.perf_counter() - started
        for count in (1, 2):
            batch = torch.zeros(0, 0, dtype=torch.long) if tokens is None else tokens[:count]
            started = time.perf_counter()
            loss.gradients(values, batch)
            times.append(time.perf_counter() - started)
    sequence = max(0.0, times[1] - times[0]) if learn.rounds else 0.0
    if learn.objective == "kurtosis" and job.tokens is not None:
        looking *= len(job.tokens) / 2
    return looking + learn.steps * (times[0] + (learn.batch_size - 1) * sequence)


def _allocating(job: Job, stream: Stream, runner: BlockRunner, outer: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Seconds that the models with one layer rounded take to run, and bytes of their hidden states."""
    allocate = job.recipe.weights.allocate
    assert allocate is not None
    assert stream.hidden is not None
    state, ticks = stream.hidden[:1].to(stream.device), [time.perf_counter()]
    stream.few(0, stream.local(fold(job.plan, job.store.read(job.graph.block_params(0)))), state)
    ticks.append(time.perf_counter())
    runner.finish(state, stream.local(outer))
    ticks.append(time.perf_counter())
    inside = sum(op.weight in job.targets for group in job.graph.blocks for op in group.linears)
    trials = inside * len(allocate.bits) * allocate.nsamples
    blocks = trials * (len(job.graph.blocks) + 1) / 2  # each starts at its own
    seconds = blocks * (ticks[1] - ticks[0]) + trials * (ticks[2] - ticks[1])
    return seconds, trials * state.numel() * state.element_size()


def _finishing(
    job: Job, stream: Stream, runner: BlockRunner, outer: dict[str, torch.Tensor], forward: float
) -> tuple[float, int]:
    """Seconds that the last touch takes, and bytes that it holds: the original's hidden states, those of a batch in
    front of every block, and one sequence's logits.

    `forward` is what one sequence takes to run through a block. A step runs forth, and back at twice that after having
    run forth again.
    """
    finish = job.recipe.finish
    assert finish is not None
    assert job.tokens is not None
    assert stream.hidden is not None
    state, started = stream.hidden[:1].to(stream.device), time.perf_counter()
    logits = runner.finish(state, stream.local(outer))
    head, blocks = time.perf_counter() - started, len(job.graph.blocks)
    stepped, tried = finish.steps * finish.batch_size, 2 * finish.held_out
    passes = len(job.tokens) + 4 * stepped + tried
    seconds = passes * blocks * forward + (5 * stepped + 2 * tried) * head
    held = len(job.tokens) + (blocks + 1) * finish.batch_size
    return seconds, held * state.numel() * state.element_size() + 6 * logits.numel() * 4


def _rounding(job: Job, stream: Stream | None) -> tuple[float, float, float]:
    """Seconds for one block: reading, folding, observing what is measured, calibrating, rounding, running on; those of
    them that the solver takes; and those that one sequence takes to run through.
    """
    model, started = job.store.skeleton(), time.perf_counter()
    tensors = fold(job.plan, job.store.read(job.graph.block_params(0)))
    reading = time.perf_counter() - started
    started = time.perf_counter()
    block, running = job.graph.blocks[0], stream if job.needs_stream else None
    rounded, _, deployed = round_block(job, 0, block, tensors, running, lambda: None, [], None)
    whole, observed = time.perf_counter() - started, 0.0 if running is None else running.observing_seconds
    tuning = 0.0 if running is None else _tuning(job, tensors, rounded, running)
    forward = 0.0
    if stream:
        started = time.perf_counter()
        with attached(model, job.running_in(0)):
            stream.run(0, deployed)
        forward = time.perf_counter() - started
    passes = int(job.needs_stream) + int(job.centers_keys) + int(job.recipe.weights.correct_bias)
    passes += measuring_passes(job.recipe)
    solving = whole - observed
    seconds = reading + solving + tuning + _scale(job, stream) * (observed + passes * forward)
    return seconds, solving, forward / len(stream.input_ids) if stream else 0.0


def _tuning(job: Job, tensors: dict[str, torch.Tensor], rounded: dict[str, QuantizedWeight], stream: Stream) -> float:
    """Seconds that tuning takes for one block, from its first two steps on."""
    tune = job.recipe.weights.tune
    if tune is None:
        return 0.0
    ticks = [time.perf_counter()]
    short = tune.model_copy(update={"iters": 2})
    tune_rounded(job, 0, tensors, rounded, stream, short, lambda: ticks.append(time.perf_counter()))
    step, rest = (ticks[2] - ticks[0]) / 2, time.perf_counter() - ticks[2]
    return tune.iters * step + rest


def _short_stream(job: Job, runner: BlockRunner, outer: dict[str, torch.Tensor]) -> Stream | None:
    if not (job.needs_stream or job.measures or job.recipe.finish):
        return None
    assert job.tokens is not None
    batch = max(1, 4096 // job.tokens.shape[1])
    return job.stream(runner, job.tokens[: _BATCHES * batch], outer)


def _scale(job: Job, stream: Stream | None) -> float:
    return 0.0 if stream is None or job.tokens is None else len(job.tokens) / len(stream.input_ids)


def _missing_hidden(job: Job, stream: Stream | None) -> int:
    """Bytes of hidden states that the whole run holds beyond what the measurement held."""
    if stream is None or stream.hidden is None or job.tokens is None or job.output.offload:
        return 0
    rows = len(job.tokens) - len(stream.input_ids)
    copies = 1 if stream.original is None else 2
    return copies * rows * stream.hidden[0].numel() * stream.hidden.element_size()


__all__ = ["Prediction", "predict"]
