"""Runs an external solver, which rounds the whole model."""

from __future__ import annotations

from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.external_solver import run_external_solver
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Stage


class RunExternalSolver(Stage):
    """Rounds the folded model with an external solver. Writes `external_codes`. The journal keeps nothing of it."""

    name = "external solver"

    def applies(self, job: Job) -> bool:
        return job.has_external_solver

    def run(self, context: RunContext) -> None:
        context.job.state.external_codes = run_external_solver(context.job, context.progress)

    def memory(self, model: MemoryModel) -> float:
        """Two copies of the whole model in fp32."""
        return model.measured_maps + 2 * 4 * model.numel(model.job.store.shapes)

    def cost(self, probe: CostProbe) -> StageCost:
        """Memory from the sizes. The time of the solver is unknown."""
        return StageCost(probe.model.base + int(self.memory(probe.model)))
