"""Finds out how much every calibration token counts for every layer."""

from __future__ import annotations

import torch

from gyroquant.pipeline.backward import backward_cost, backward_memory
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage, shorter_windows
from gyroquant.pipeline.token_weights import AT_ONCE, TOKEN_WEIGHTS, TokenWeights, keep, restore
from gyroquant.pipeline.trials import has_gradient_costs


class Guide(Stage):
    """Runs the model backwards. Writes `token_weights` and `kronecker`. If bits were allocated by gradient, that pass
    is used.
    """

    name, journal_key = "guide", TOKEN_WEIGHTS

    def applies(self, job: Job) -> bool:
        return job.recipe.weights.guided is not None

    @torch.no_grad()
    def run(self, context: RunContext) -> None:
        job, journal = context.job, context.journal
        assert job.recipe.weights.guided is not None
        if journal.get(self.journal_key) is None:
            keep(job, TokenWeights(job.recipe.weights.guided, journal.folder), journal, context.progress)
        restore(job, journal)

    def memory(self, model: MemoryModel) -> float:
        """A backward pass of some windows with the factors of a block, and the weights of all tokens as they are
        collected.
        """
        guided = model.recipe.weights.guided
        assert guided is not None
        collected = 4 * guided.groups * model.tokens * len(model.job.targets)
        return backward_memory(model, AT_ONCE, 2 * model.kronecker()) + 2 * collected

    def cost(self, probe: CostProbe) -> StageCost:
        job, allocate = probe.job, probe.job.recipe.weights.allocate
        assert job.tokens is not None
        done = allocate.nsamples if allocate is not None and has_gradient_costs(job) else 0
        windows = max(0, len(job.tokens) - done)
        return probe.measured(lambda: backward_cost(probe, windows, min(windows, AT_ONCE)))

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        return [*super().remedies(job, shortage), shorter_windows(job)]
