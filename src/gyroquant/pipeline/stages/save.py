"""Writes the output folder: merges the pieces, and adds tokenizer, configuration and other files."""

from __future__ import annotations

from gyroquant.finetuning.rotations_file import FILE_NAME, rotations_of, write_rotations
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Stage


class Save(Stage):
    """Completes the folder except for manifest and checksums. Writes `bits` and `untied` in the manifest."""

    name = "save"

    def run(self, context: RunContext) -> None:
        job, writer, folder = context.job, context.writer, context.folder
        writer.online([*job.plan.online, *job.quantizers])
        writer.carry()
        folder.merge()
        untied = list(job.plan.unties(job.store.read(job.graph.outer_params())))
        job.state.results |= {"untied": untied, "bits": writer.bits()}
        writer.finish(job.tokenizer, untied)
        rotations = {} if job.recipe.learn is None else rotations_of(job.plan, job.recipe.learn.sites)
        if rotations:
            write_rotations(folder.partial / FILE_NAME, rotations)

    def memory(self, model: MemoryModel) -> float:
        """The parameters around the blocks, folded in fp32 and again in the output's dtype, and the hidden states."""
        itemsize = model.job.output.dtype.itemsize
        largest, saved = max(map(model.numel_of, model.outer)), itemsize * model.outer_numel
        copying = model.outer_folded + saved + largest * (itemsize + 3)
        return model.measured_maps + model.in_memory + max(model.making_outer, copying)

    def cost(self, probe: CostProbe) -> StageCost:
        return probe.around
