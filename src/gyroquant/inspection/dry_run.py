"""Estimates time and memory of a quantization by measuring its first block and first steps."""

from __future__ import annotations

import torch

from gyroquant.models.execution.runner import evaluating
from gyroquant.pipeline.cost_probe import CostProbe
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.resources import ResourceEstimate, StageEstimate, disk
from gyroquant.pipeline.stages import STAGES
from gyroquant.system.environment import steady_memory


@torch.no_grad()
def dry_run_job(job: Job) -> ResourceEstimate:
    """Runs the stages on one block and some of the text, and scales the results to all blocks, tokens and steps.

    The time does not include the choice of maps from statistics, an external solver, or the rounding of a head. Each
    stage has its own memory peak on Linux only; on other systems it is the largest peak so far. The state of `job` does
    not change.
    """
    steady_memory()
    job = Job.begin(job.spec)
    probe, stages = CostProbe(job), list[StageEstimate]()
    with evaluating(job.store.skeleton()):
        for stage in STAGES:
            cost = stage.cost(probe) if stage.applies(job) else None
            if cost is not None:
                stages.append(StageEstimate(stage.name, cost.peak_memory_bytes, cost.seconds))
    return ResourceEstimate(tuple(stages), *disk(job), hidden_bytes=probe.model.hidden)


__all__ = ["dry_run_job"]
