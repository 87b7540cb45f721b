"""Finetunes the scales and gains of the saved model end to end."""

from __future__ import annotations

import time

from gyroquant.finetuning import finetune
from gyroquant.models.execution.runner import evaluating
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage, fewer_samples, shorter_windows
from gyroquant.system.environment import available_memory

_SHARE = 0.25  # of the available memory that kept blocks may take
_SAVED = 4  # activations that autograd saves, in units of those of a forward pass


class Finetune(Stage):
    """Tunes the saved folder in place. Writes `finetuned` in the manifest. The journal keeps its state."""

    name, journal_key = "finetune", "finetuning"

    def applies(self, job: Job) -> bool:
        return job.recipe.finetune is not None

    def run(self, context: RunContext) -> None:
        job, settings = context.job, context.job.recipe.finetune
        assert settings is not None
        assert job.tokens is not None
        started, store = time.perf_counter(), open_model(context.folder.partial)
        assert isinstance(store, PackedStore)
        checkpoint = context.journal.path(self.journal_key)
        with evaluating(store.skeleton()):
            arguments = (settings, job.compute_dtype, job.recipe.seed)
            keep = _kept(MemoryModel(job)) > 0
            result = finetune(store, job.store, job.tokens, *arguments, context.progress, checkpoint, keep)
        job.state.results["finetuned"] = result | {"seconds": round(time.perf_counter() - started, 3)}

    def memory(self, model: MemoryModel) -> float:
        """Hidden states of the original, inputs of every block for a batch, one block with gradients, logits.

        If all blocks are kept, these and the activations of a sequence.
        """
        settings = model.recipe.finetune
        assert settings is not None
        outer, blocks, block = model.numel(model.outer), len(model.graph.blocks), model.numel(model.block)
        state = model.length * model.width * model.compute
        copy = model.compute if model.compute != model.stored else 0
        rounded = model.numel(model.job.targets)
        sizes = [grid.group_size if grid.group_size > 0 else model.width for grid in model.job.grids.values()]
        tuned = 4 * 4 * (rounded // max(1, min(sizes)))
        held = outer * (model.stored + copy) + model.tokens * model.width * model.compute
        states = (blocks + 1) * settings.batch_size * state
        logits = 6 * 4 * model.length * model.graph.config.vocab_size + 2 * 4 * model.outer_numel
        backward = 20 * block + 3 * model.activations(model.length, model.compute)
        return model.measured_maps + held + tuned + states + max(logits, backward) + _kept(model)

    def cost(self, probe: CostProbe) -> StageCost:
        """Memory from the sizes. A step takes a forward pass, two if blocks are not kept, and a backward pass, which
        counts as two more.
        """
        job, settings = probe.job, probe.job.recipe.finetune
        assert settings is not None
        assert job.tokens is not None
        head = _head_seconds(probe)
        trained, held_out = settings.steps * settings.batch_size, 2 * settings.held_out
        passes = len(job.tokens) + (3 if _kept(probe.model) else 4) * trained + held_out
        seconds = passes * len(job.graph.blocks) * probe.forward_seconds + (5 * trained + 2 * held_out) * head
        return StageCost(probe.model.base + int(self.memory(probe.model)), seconds)

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        return [
            *fewer_samples(job, shortage, shortage.hidden_bytes),
            "leave finetuning out (--set finetune=null)",
            shorter_windows(job),
        ]


def _kept(model: MemoryModel) -> int:
    """Bytes of all blocks, decoded, and of the activations of a sequence that the backward pass needs. 0 if that is
    more than a part of the memory: then each block is decoded and run again.
    """
    blocks = len(model.graph.blocks)
    copy = model.compute if model.compute != 4 else 0
    kept = blocks * ((4 + copy) * model.numel(model.block) + _SAVED * model.activations(model.length, model.compute))
    return kept if kept < _SHARE * available_memory() else 0


def _head_seconds(probe: CostProbe) -> float:
    """Seconds of the head for one sequence."""
    job, stream = probe.job, probe.stream
    assert stream is not None
    assert stream.hidden is not None
    outer = stream.local(job.plan.read_outer(job.store))
    started = time.perf_counter()
    stream.runner.finish(stream.hidden[:1].to(stream.device), outer)
    return time.perf_counter() - started
