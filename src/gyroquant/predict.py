"""How long a quantization will take and how much memory it will need, measured on its first block and first steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from gyroquant.blockwise import decoded, round_block, tune_rounded
from gyroquant.calibration.measure import Want, measure
from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.environment import forget_peak, peak_memory_bytes, steady_memory
from gyroquant.estimate import Prediction, Reckoning, Stage, disk, observer_bytes
from gyroquant.grids import QuantizedWeight
from gyroquant.job import Job, learning_setting
from gyroquant.learning.learn import begin
from gyroquant.learning.objectives import Sample
from gyroquant.learning.parameters import Steps
from gyroquant.models.fold import FoldPlan, fold
from gyroquant.models.online import attached
from gyroquant.models.prove import folded_outer, prove
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.pipeline import proof_sample
from gyroquant.planning import measuring_passes, observed_sites
from gyroquant.progress import Stages
from gyroquant.rounding.allocate import grids_by_bits
from gyroquant.rounding.base import ModelSolver
from gyroquant.rounding.stage import Part, round_part

_BATCHES = 2  # batches of calibration text that the first block is measured on
Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def predict(job: Job) -> Prediction:
    """Runs the stages on one block and some of the text, and scales up what grows with blocks, tokens and steps.

    What methods take to choose their maps from what was measured is not counted in the time, nor is a solver from
    outside, nor a head that is rounded. Peaks of stages are told apart on Linux only; elsewhere each is the largest so
    far.
    """
    steady_memory()
    stages: list[Stage] = []
    reckoned = dict(Reckoning(job).totals())
    with evaluating(job.store.skeleton()):
        if job.measures:
            stages.append(_peak("measure", lambda: _measuring(job)))
        if job.recipe.learn is not None:
            stages.append(_peak("learn", lambda: _learning(job)))
        if job.plan.edits or job.plan.online:
            stages.append(_peak("prove", lambda: _proving(job)))
        if isinstance(job.recipe.weights.solver, ModelSolver):
            stages.append(Stage("solve", reckoned["solve"]))
        forget_peak()
        stream, saving = _saving(job)
        save = Stage("save", peak_memory_bytes() + _missing_hidden(job, stream), saving)
        forget_peak()
        each, forward = _rounding(job, stream)
        whole = Stage("round", peak_memory_bytes() + _missing_hidden(job, stream), len(job.graph.blocks) * each)
        heads = _heads(job, stream) if job.recipe.finish is not None else 0.0
        del stream
        if job.recipe.weights.allocate is not None:
            stages.append(_peak("allocate", lambda: _allocating(job)))
        stages += [whole, save]
        if job.recipe.finish is not None:
            stages.append(Stage("finish", reckoned["finish"], _finishing(job, forward, heads)))
    return Prediction(tuple(stages), *disk(job), hidden_bytes=Reckoning(job).hidden)


def _peak(name: str, run: Callable[[], tuple[float, int]]) -> Stage:
    """A stage whose part is run; what it returns are the seconds of the whole, and bytes beyond those of the part."""
    forget_peak()
    seconds, beyond = run()
    return Stage(name, peak_memory_bytes() + beyond, seconds)


class _Ticks(Stages):
    """Notes when progress is made."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def tick(self) -> None:
        """Notes a step."""
        self.times.append(time.perf_counter())

    def last(self) -> float:
        """Seconds of the last step; of the only one if there was one."""
        return self.times[-1] - self.times[-2] if len(self.times) > 1 else 0.0


class _Steps(_Ticks):
    """The same for what shows progress in stages."""

    def stage(self, name: str, steps: int) -> Any:
        return nullcontext(self.tick)


def _short(job: Job) -> torch.Tensor:
    """A few batches of the calibration text."""
    assert job.tokens is not None
    return job.tokens[: _BATCHES * max(1, 4096 // job.tokens.shape[1])]


def _measuring(job: Job) -> tuple[float, int]:
    """One block with the observers of its sites. All observers are held at once, and what is made of second moments."""
    assert job.tokens is not None
    sites, short, ticks = observed_sites(job.graph, job.recipe), _short(job), _Steps()
    wants = [Want(site, kinds) for site, kinds in sites if site.block in (None, 0)]
    how = (ticks, job.compute_dtype, job.output.device)
    measure(job.store, FoldPlan(job.graph), wants, short, *how, blocks=1)
    everything = sum(observer_bytes(kind, site.n) for site, kinds in sites for kind in kinds)
    held = sum(observer_bytes(kind, want.site.n) for want in wants for kind in want.kinds)
    steps = len(job.graph.blocks) * -(-len(job.tokens) // max(1, 4096 // job.tokens.shape[1]))
    rows = 0 if job.output.offload else job.tokens.numel() - short.numel()
    hidden = rows * job.graph.hidden * job.compute_dtype.itemsize
    return measuring_passes(job.recipe) * steps * ticks.last(), everything - held + hidden


def _proving(job: Job) -> tuple[float, int]:
    """The whole text of the proof, through two blocks."""
    ticks, sample = _Ticks(), proof_sample(job)
    runner, blocks = BlockRunner(job.store.skeleton(), job.graph), len(job.graph.blocks)
    few = min(2, blocks)
    prove(job.store, job.plan, runner, sample, float("inf"), lambda done, total: ticks.tick(), few)
    each = ticks.last()
    return time.perf_counter() - ticks.times[0] + (blocks - few) * each, 0


def _learning(job: Job) -> tuple[float, int]:
    """Steps on one sequence and on two tell what a step and what a sequence costs.

    Before its first step, kurtosis looks at the whole text.
    """
    learn = job.recipe.learn
    assert learn is not None
    tokens = None if job.tokens is None else job.tokens[:2]
    setting = learning_setting(job.recipe, tokens, job.targets, job.quantizers, job.compute_dtype)
    times, started = [], time.perf_counter()
    with torch.enable_grad():
        _, places, values, loss = begin(job.store, job.plan, learn, setting, Stages())
        looking = time.perf_counter() - started
        for count in (1, 2):
            batch = torch.zeros(0, 0, dtype=torch.long) if tokens is None else tokens[:count]
            started = time.perf_counter()
            _, gradients = loss.gradients(values, batch)
            times.append(time.perf_counter() - started)
    steps, started = Steps(learn), time.perf_counter()
    for label, place in places.items():
        steps.take(place, label, values[label], gradients[label], 0)
    moving = time.perf_counter() - started
    sequence = max(0.0, times[1] - times[0]) if learn.rounds else 0.0
    beyond = 0
    if job.tokens is not None and learn.objective == "kurtosis":
        looking *= len(job.tokens) / 2
        more = job.tokens[2:].numel()
        beyond = more * job.graph.hidden * job.compute_dtype.itemsize
        beyond += sum(4 * min(more, Sample.rows) * job.plan.folded[place.index][0].n for place in places.values())
    if job.tokens is not None and learn.objective == "blocks":
        state = job.tokens.shape[1] * job.graph.hidden * job.compute_dtype.itemsize
        beyond = 2 * max(0, learn.batch_size - 2) * state
    return looking + learn.steps * (times[0] + (learn.batch_size - 1) * sequence + moving), beyond


@torch.no_grad()
def _saving(job: Job) -> tuple[Stream | None, float]:
    """The parameters around the blocks, folded and in the dtype of the output, and hidden states of a short text."""
    started = time.perf_counter()
    outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
    stream = None
    if job.needs_stream or job.recipe.finish is not None:
        stream = job.stream(BlockRunner(job.store.skeleton(), job.graph), _short(job), outer)
    saved = {name: tensor.to(job.output.dtype) for name, tensor in outer.items()}
    for tensor in saved.values():
        tensor.isfinite().all()
    return stream, time.perf_counter() - started


def _rounding(job: Job, stream: Stream | None) -> tuple[float, float]:
    """Seconds for one block: reading, folding, observing what is measured, calibrating, rounding, running on, packing;
    and those that one sequence takes to run through.
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
    started = time.perf_counter()
    for weight in rounded.values():
        weight.pack()
    reading += time.perf_counter() - started
    passes = int(job.needs_stream) + int(job.centers_keys) + int(job.recipe.weights.correct_bias)
    solving = whole - observed
    seconds = reading + solving + tuning + _scale(job, stream) * (observed + passes * forward)
    return seconds, forward / len(stream.input_ids) if stream else 0.0


def _tuning(job: Job, tensors: Tensors, rounded: dict[str, QuantizedWeight], stream: Stream) -> float:
    """Seconds that tuning takes for one block, from its first two steps on."""
    tune = job.recipe.weights.tune
    if tune is None:
        return 0.0
    ticks = _Ticks()
    tune_rounded(job, 0, tensors, rounded, stream, tune.model_copy(update={"iters": 2}), ticks.tick)
    step, rest = (ticks.times[2] - ticks.times[0]) / 2, time.perf_counter() - ticks.times[2]
    return tune.iters * step + rest


@torch.no_grad()
def _allocating(job: Job) -> tuple[float, int]:
    """The first block observed, rounded to one number of bits and run with one layer of it rounded; and the head."""
    allocate, group = job.recipe.weights.allocate, job.graph.blocks[0]
    assert allocate is not None
    assert job.tokens is not None
    outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
    runner = BlockRunner(job.store.skeleton(), job.graph)
    stream = Stream(runner, _short(job), outer, job.compute_dtype, None, job.output.device)
    assert stream.hidden is not None
    tensors, online = fold(job.plan, job.store.read(job.graph.block_params(0))), job.plan.online_in(0)
    ticks = _Ticks()
    with attached(runner.model, online), observing(runner.model, group, online, stream.observer) as observed:
        stream.observe(0, tensors)
    ticks.tick()
    local, state = stream.local(tensors), stream.hidden[:1].to(stream.device)
    with attached(runner.model, online):
        stream.few(0, local, state)
        ticks.tick()
        grid = grids_by_bits(job.recipe.weights.grid, allocate.bits)[max(allocate.bits)]
        solved = round_part(Part(group, job.targets, tensors, observed, online), job.rounding(lambda text: None, grid))
        stream.few(0, local | stream.local(decoded(job, dict([*solved.items()][-1:]))), state)
        ticks.tick()
        stream.run(0, tensors)
    ticks.tick()
    del local, tensors, solved, observed
    wanted = runner.finish(state, stream.local(outer)).float().log_softmax(-1)
    found = runner.finish(state, stream.local(outer)).float().log_softmax(-1)
    (wanted.exp() * (wanted - found)).sum()
    ticks.tick()
    observing_, one, solving, running, heads = (b - a for a, b in zip(ticks.times, ticks.times[1:], strict=False))
    count, blocks = sum(op.weight in job.targets for g in job.graph.blocks for op in g.linears), len(job.graph.blocks)
    trials = count * len(allocate.bits) * allocate.nsamples
    seconds = blocks * (_scale(job, stream) * (observing_ + running) + len(allocate.bits) * solving)
    seconds += trials * ((blocks + 1) / 2 * one + heads / 2)  # each starts at its own block
    rows = 0 if job.output.offload else job.tokens.numel() - stream.input_ids.numel()
    size = state.element_size()
    return seconds, trials * state.numel() * size + rows * job.graph.hidden * size


def _heads(job: Job, stream: Stream | None) -> float:
    """Seconds that the head takes for one sequence."""
    assert stream is not None
    assert stream.hidden is not None
    outer = stream.local(folded_outer(job.plan, job.store.read(job.graph.outer_params())))
    started = time.perf_counter()
    stream.runner.finish(stream.hidden[:1].to(stream.device), outer)
    return time.perf_counter() - started


def _finishing(job: Job, forward: float, head: float) -> float:
    """Seconds that the last touch takes, where one sequence takes `forward` through a block and `head` to its logits.

    A step runs forth, and back at twice that after having run forth again.
    """
    finish = job.recipe.finish
    assert finish is not None
    assert job.tokens is not None
    stepped, tried = finish.steps * finish.batch_size, 2 * finish.held_out
    passes = len(job.tokens) + 4 * stepped + tried
    return passes * len(job.graph.blocks) * forward + (5 * stepped + 2 * tried) * head


def _scale(job: Job, stream: Stream | None) -> float:
    return 0.0 if stream is None or job.tokens is None else len(job.tokens) / len(stream.input_ids)


def _missing_hidden(job: Job, stream: Stream | None) -> int:
    """Bytes of hidden states that the whole run holds beyond what the measurement held."""
    if stream is None or stream.hidden is None or job.tokens is None or not job.needs_stream or job.output.offload:
        return 0
    rows = len(job.tokens) - len(stream.input_ids)
    copies = 1 if stream.original is None else 2
    return copies * rows * stream.hidden[0].numel() * stream.hidden.element_size()


__all__ = ["predict"]
