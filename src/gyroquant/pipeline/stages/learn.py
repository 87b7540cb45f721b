"""Learns rotations."""

from __future__ import annotations

import time

import torch

from gyroquant.finetuning import learn
from gyroquant.finetuning.objectives import Sample
from gyroquant.finetuning.parameters import Steps
from gyroquant.finetuning.rotations import begin
from gyroquant.models.folding.fold import ApplyMap
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.planning import learning_setting, rounds_while_learning
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage, shorter_windows
from gyroquant.system.progress import Progress


class Learn(Stage):
    """Learns rotations. Writes `plan`, and `learned` in the manifest. The journal keeps the state between steps."""

    name, journal_key = "learn", "learning"

    def applies(self, job: Job) -> bool:
        return job.recipe.learn is not None

    def run(self, context: RunContext) -> None:
        job, settings = context.job, context.job.recipe.learn
        assert settings is not None
        started = time.perf_counter()
        setting = learning_setting(job.recipe, job.plan, job.tokens, job.targets, job.quantizers, job.compute_dtype)
        checkpoint = context.journal.path(self.journal_key)
        result = learn(job.store, job.plan, settings, setting, context.progress, checkpoint)
        job.state.plan = result.plan
        job.state.results["learned"] = {
            "losses": result.losses,
            "drift": result.drift,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def memory(self, model: MemoryModel) -> float:
        return model.measured_maps + (_end_to_end(model) if _is_end_to_end(model.job) else _one_block(model))

    def cost(self, probe: CostProbe) -> StageCost:
        return probe.measured(lambda: _first_steps(probe))

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        if _is_end_to_end(job):
            return ["learn a block at a time (--set learn.objective=blocks)", shorter_windows(job)]
        return [*super().remedies(job, shortage), shorter_windows(job)]


def _is_end_to_end(job: Job) -> bool:
    """Whether the objective runs the whole model, with gradients."""
    return job.recipe.learn is not None and job.recipe.learn.objective not in ("weights", "blocks", "kurtosis")


def _one_block(model: MemoryModel) -> int:
    """Bytes for a block with gradients, and for the data of the text that the objective holds."""
    learn = model.recipe.learn
    assert learn is not None
    block = model.numel(model.block)
    hidden = learn.batch_size * model.length * model.width * model.compute
    sample = sum(4 * Sample.rows * site.n for site, _, _ in model.job.plan.folded if site.name in learn.sites)
    extra = {"weights": 0, "kurtosis": sample + model.hidden, "blocks": 2 * hidden}[learn.objective]
    activations = 0 if learn.objective == "weights" else 3 * model.activations(model.length, model.compute)
    outer = 0 if learn.objective == "weights" else model.compute * model.numel(model.outer)
    return block * (model.stored + 5 * 4) + model.folding(model.block) + activations + extra + outer


def _end_to_end(model: MemoryModel) -> int:
    """Bytes for the whole model with gradients, activations of every block, and logits."""
    learn, plan = model.recipe.learn, model.job.plan
    assert learn is not None
    names = list(model.job.store.shapes)
    everything = model.numel(names) + model.numel(n for n in model.graph.tied if plan.edits.get(n))
    maps = {n: sum(isinstance(edit, ApplyMap) for edit in edits) for n, edits in plan.edits.items()}
    edited = sum(model.numel_of(n) * (1 + count) for n, count in maps.items())  # the input of each map is kept
    original = model.compute * model.numel(names) if learn.objective == "kl" and model.compute != model.stored else 0
    rounded = 3 * 4 * model.numel(model.job.targets) if rounds_while_learning(model.recipe) else 0
    typed = 2 * model.compute if model.compute != 4 else 4  # copies in another dtype, and their gradients
    held = model.stored * model.numel(names) + everything * (4 + typed) + 4 * edited + rounded + original
    logits = 4 * 4 * model.length * model.graph.config.vocab_size
    return held + len(model.graph.blocks) * 2 * model.activations(model.length, model.compute) + logits


def _first_steps(probe: CostProbe) -> tuple[float, int]:
    """Runs a step on one sequence and one on two. Returns the seconds of the whole stage, and its additional bytes.

    The objective kurtosis also runs the whole text once before its first step.
    """
    job, learn = probe.job, probe.job.recipe.learn
    assert learn is not None
    tokens = None if job.tokens is None else job.tokens[:2]
    setting = learning_setting(job.recipe, job.plan, tokens, job.targets, job.quantizers, job.compute_dtype)
    times, started = [], time.perf_counter()
    with torch.enable_grad():
        _, places, values, loss = begin(job.store, job.plan, learn, setting, Progress())
        preparing = time.perf_counter() - started
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
        preparing *= len(job.tokens) / 2
        more = job.tokens[2:].numel()
        beyond = more * job.graph.hidden * job.compute_dtype.itemsize
        beyond += sum(4 * min(more, Sample.rows) * job.plan.folded[place.index][0].n for place in places.values())
    if job.tokens is not None and learn.objective == "blocks":
        state = job.tokens.shape[1] * job.graph.hidden * job.compute_dtype.itemsize
        beyond = 2 * max(0, learn.batch_size - 2) * state
    return preparing + learn.steps * (times[0] + (learn.batch_size - 1) * sequence + moving), beyond
