"""Chooses the maps that depend on statistics of the original model on the calibration text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.calibration.observers import SecondMoments
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.stores.base import WeightStore
from gyroquant.pipeline.cost_probe import CostProbe, StageCost, Ticks
from gyroquant.pipeline.folds import dump_plan, load_plan, measuring_passes, plan_folds
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel, observer_bytes
from gyroquant.pipeline.stages.base import RunContext, Stage
from gyroquant.recipes.schema import Recipe
from gyroquant.system.progress import Progress

_AXES = 28  # bytes per entry of second moments while their principal axes are computed, in fp64


class Measure(Stage):
    """Chooses the maps that need statistics. Writes `plan`."""

    name, journal_key = "measure", "measured"

    def applies(self, job: Job) -> bool:
        return job.measures

    def run(self, context: RunContext) -> None:
        job, journal = context.job, context.journal
        record = journal.get(self.journal_key)
        if record is None:
            assert job.tokens is not None
            settings = (job.compute_dtype, job.output.device, context.progress, job.output.offload)
            maps, arrays = dump_plan(measured_plan(job.store, job.recipe, job.tokens, *settings))
            journal.put(self.journal_key, arrays, {"maps": maps})
            record = journal.get(self.journal_key)
        assert record is not None
        job.state.plan = load_plan(job.graph, job.recipe, record["maps"], journal.tensors(self.journal_key))

    def memory(self, model: MemoryModel) -> float:
        """The parameters around the blocks, a block, the text, all observers, and maps computed from second moments."""
        outer, block = model.numel(model.outer), model.numel(model.block)
        copy = model.compute if model.compute != model.stored else 0
        observers = sum(observer_bytes(kind, site.n) for site, kinds in model.observed for kind in kinds)
        choosing = max((_AXES * site.n**2 for site, kinds in model.observed if SecondMoments in kinds), default=0)
        hidden = 0 if model.job.output.offload is not None else model.tokens * model.width * model.compute
        running = block * (model.stored + copy) + model.activations(model.batch, max(4, model.compute))
        return outer * (model.stored + copy) + hidden + observers + max(running, choosing, model.reading(model.outer))

    def cost(self, probe: CostProbe) -> StageCost:
        return probe.measured(lambda: _first_block(probe))


def measured_plan(
    store: WeightStore,
    recipe: Recipe,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    offload: Path | None = None,
) -> FoldPlan:
    """The plan of a recipe with maps chosen from statistics of the original model on `tokens`, (samples, length)."""

    def measure_sites(plan: FoldPlan, sites: list[SiteMeasurement]) -> None:
        measure(store, plan, sites, tokens, progress, dtype, device, offload)

    return plan_folds(store.graph, recipe, measure_sites)


def _first_block(probe: CostProbe) -> tuple[float, int]:
    """Measures the sites of one block. The whole stage holds the observers of all blocks, which is added here."""
    job, sites, sample, ticks = probe.job, probe.model.observed, probe.sample, Ticks()
    assert job.tokens is not None
    here = [SiteMeasurement(site, kinds) for site, kinds in sites if site.block in (None, 0)]
    settings = (ticks, job.compute_dtype, job.output.device)
    measure(job.store, FoldPlan(job.graph), here, sample, *settings, blocks=1)
    everything = sum(observer_bytes(kind, site.n) for site, kinds in sites for kind in kinds)
    held = sum(observer_bytes(kind, seen.site.n) for seen in here for kind in seen.kinds)
    rows = 0 if job.output.offload else job.tokens.numel() - sample.numel()
    hidden = rows * job.graph.hidden * job.compute_dtype.itemsize
    seconds = measuring_passes(job.recipe) * len(job.graph.blocks) * probe.steps * ticks.last()
    return seconds, everything - held + hidden
