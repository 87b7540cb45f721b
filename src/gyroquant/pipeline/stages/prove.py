"""Proves that the folded model is the same function as the original."""

from __future__ import annotations

import time

from torch import Tensor

from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import Proof, prove
from gyroquant.models.stores.base import WeightStore
from gyroquant.pipeline.cost_probe import CostProbe, StageCost, Ticks
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage
from gyroquant.pipeline.validation import check_folded
from gyroquant.recipes.schema import Recipe
from gyroquant.system.progress import Progress


class Prove(Stage):
    """Proves the fold, and refuses one that is not exact. Writes `proof` in the manifest.

    If nothing is folded, the proof needs no computation and its error is 0.
    """

    name, journal_key = "prove", "proof"

    def run(self, context: RunContext) -> None:
        job, state = context.job, context.job.state
        state.warnings += check_folded(job.store, job.plan, job.targets, job.output.dtype)
        arguments = (job.store, job.plan, job.proof_tokens, job.recipe, context.progress)
        state.results["proof"] = context.journal.stage(self.journal_key, lambda: prove_plan(*arguments).to_dict())

    def memory(self, model: MemoryModel) -> float | None:
        """Two sets of parameters around the blocks, one block, two sets of logits and their difference."""
        if not _folds(model.job.plan):
            return None
        settings = model.recipe.proof
        tokens = min(settings.nsamples * settings.seqlen, model.tokens)
        outer, block = model.stored * model.numel(model.outer), model.numel(model.block)
        states, logits = 3 * 4 * tokens * model.width, 4 * tokens * model.graph.config.vocab_size
        copied = 4 * model.numel(model.outer) if model.stored not in (0, 4) else 0
        folded, folding = model.outer_folded, model.folding(model.outer)
        kept = block * (model.stored + 4)
        running = kept + max(model.folding(model.block), 4 * block + model.activations(tokens, 4)) + states
        ending = kept + states + max(copied + logits, logits + folded + max(folding, logits), 3 * logits)
        reading = model.reading(model.outer)
        return model.measured_maps + outer + max(copied, folded + folding, running, ending, reading)

    def cost(self, probe: CostProbe) -> StageCost | None:
        return probe.measured(lambda: _two_blocks(probe.job)) if _folds(probe.job.plan) else None

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        return ["prove on less text (--set proof.nsamples=1)"]


def prove_plan(store: WeightStore, plan: FoldPlan, tokens: Tensor, recipe: Recipe, progress: Progress) -> Proof:
    """Proves that a model stays the same function when a plan is folded into it, on tokens (samples, length).

    Raises ProofError if the error is above the recipe's threshold.
    """
    blocks, threshold = len(plan.graph.blocks), recipe.proof.threshold
    if not _folds(plan):  # then the folded model is the original, bit for bit
        return Proof(0.0, 0, 0.0, threshold, 0, (0.0,) * blocks)
    runner = BlockRunner.of(store)
    with progress.stage(Prove.name, blocks) as advance:
        return prove(store, plan, runner, tokens, threshold, lambda done, total: advance())


def _folds(plan: FoldPlan) -> bool:
    return bool(plan.edits or plan.online)


def _two_blocks(job: Job) -> tuple[float, int]:
    """Runs the text of the proof through two blocks. Returns the seconds of the stage, and 0 additional bytes."""
    ticks, sample = Ticks(), job.proof_tokens
    runner, blocks = BlockRunner.of(job.store), len(job.graph.blocks)
    few = min(2, blocks)
    prove(job.store, job.plan, runner, sample, float("inf"), lambda done, total: ticks.tick(), few)
    each = ticks.last()
    return time.perf_counter() - ticks.times[0] + (blocks - few) * each, 0
