"""Chooses the calibration windows by coverage, or lets the model write them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.coverage import channel_peaks, covered_share, covering_windows, outliers
from gyroquant.calibration.self_text import AT_ONCE, first_tokens, special_tokens, written_windows
from gyroquant.models.execution.online import attach
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.in_memory import build_folded
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage
from gyroquant.system.journal import Journal
from gyroquant.system.progress import Progress

_MEASURED = 8  # tokens that the dry run lets the model write

Make = Callable[[], Tensor]
Keep = Callable[[int, Make], Tensor]


class Windows(Stage):
    """Makes the calibration windows that a recipe does not draw by chance. Writes `tokens`, and `windows` in the
    manifest. The journal keeps every part: the statistics of some candidates, or some written windows.
    """

    name, journal_key = "windows", "windows"

    def applies(self, job: Job) -> bool:
        settings = job.recipe.calibration
        return job.tokens is not None and (settings.source, settings.choose) != ("text", "random")

    @torch.no_grad()
    def run(self, context: RunContext) -> None:
        job = context.job
        job.state.tokens, job.state.results["windows"] = made_windows(job, context.progress, context.journal)

    def memory(self, model: MemoryModel) -> float:
        """Of coverage: a run of as many windows as are chosen. Of writing: the whole model in fp32, and its cache."""
        job, outer, block = model.job, model.numel(model.outer), model.numel(model.block)
        if job.recipe.calibration.source == "self":
            everything = model.numel(job.store.shapes)
            return 4 * (everything + 2 * outer) + _writing(job) + model.reading(model.outer)
        assert job.candidates is not None
        peaks = 4 * len(job.candidates) * len(job.graph.blocks) * model.width
        hidden = 0 if job.output.offload is not None else model.tokens * model.width * model.compute
        copy = model.compute if model.compute != model.stored else 0
        running = block * (model.stored + copy) + model.activations(model.batch, max(4, model.compute))
        return outer * (model.stored + copy) + hidden + 2 * peaks + max(running, model.reading(model.outer))

    @torch.no_grad()
    def cost(self, probe: CostProbe) -> StageCost:
        written = probe.job.recipe.calibration.source == "self"
        return probe.measured(lambda: _some_tokens(probe) if written else _one_run(probe))

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        if job.recipe.calibration.source == "self":
            return [
                "give a text (--set calibration.source=text --text FILE): writing one needs the whole model in fp32"
            ]
        return super().remedies(job, shortage)


def made_windows(job: Job, progress: Progress, journal: Journal | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The calibration windows of a job with this stage, shape (samples, length), and the facts about them.

    Parts that are in the journal are read from it.
    """

    def keep(number: int, make: Make) -> Tensor:
        if journal is None:
            return make()
        name = f"{Windows.journal_key}-{number}"
        if journal.get(name) is None:
            journal.put(name, {"part": make()}, {})
        return journal.tensors(name)["part"]

    return (_written if job.recipe.calibration.source == "self" else _chosen)(job, progress, keep)


def _chosen(job: Job, progress: Progress, keep: Keep) -> tuple[Tensor, dict[str, Any]]:
    settings, candidates = job.recipe.calibration, job.candidates
    assert candidates is not None
    arguments, peaks = (job.compute_dtype, job.output.device, job.output.offload), list[Tensor]()
    pieces = candidates.split(settings.nsamples)
    with progress.stage(Windows.name, len(job.graph.blocks) * len(pieces)) as advance:
        for number, piece in enumerate(pieces):
            peaks.append(keep(number, partial(channel_peaks, job.store, piece, *arguments, advance)))
    covers, weights = outliers(torch.cat(peaks))
    picks = covering_windows(covers, weights, settings.nsamples)
    facts = {
        "choose": "coverage",
        "candidates": len(candidates),
        "outlier_channels": len(weights),
        "covered": covered_share(covers, weights, picks),
        "covered_by_chance": covered_share(covers, weights, list(range(settings.nsamples))),
        "sha256": _digest(candidates[picks]),
    }
    return candidates[picks], facts


def _written(job: Job, progress: Progress, keep: Keep) -> tuple[Tensor, dict[str, Any]]:
    settings, model = job.recipe.calibration, list[Any]()
    first, seeds = _first(job)
    starts = range(0, settings.nsamples, AT_ONCE)
    with progress.stage(Windows.name, len(starts) * _tokens_to_write(job)) as advance:

        def write(start: int) -> Tensor:
            if not model:  # not built if the journal has all windows
                model.append(_whole_model(job))
            few = slice(start, start + AT_ONCE)
            return _write(job, model[0], first[few], seeds[few], start, settings.seqlen, advance)

        windows = [keep(number, partial(write, start)) for number, start in enumerate(starts)]
    ids = torch.cat(windows)
    return ids, {"source": "self", "sha256": _digest(ids)}


def _first(job: Job) -> tuple[Tensor, list[int]]:
    settings = job.recipe.calibration
    special = special_tokens(job.tokenizer)
    return first_tokens(job.store.text_config.vocab_size, special, settings.nsamples, settings.seed)


def _write(
    job: Job, model: Any, first: Tensor, seeds: list[int], number: int, length: int, advance: Callable[[], None]
) -> Tensor:
    return written_windows(model, first, seeds, length, number, job.bos, special_tokens(job.tokenizer), advance)


def _tokens_to_write(job: Job) -> int:
    """Tokens of a window that the model writes: all but the BOS tokens and the first one."""
    return max(0, job.recipe.calibration.seqlen - len(job.bos) - 1)


def _whole_model(job: Job) -> Any:
    model = build_folded(job.store, FoldPlan(job.graph)).to(job.output.device)
    attach(model, job.store.online)
    return model


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().contiguous().numpy().data).hexdigest()


def _writing(job: Job) -> int:
    """Bytes of the cache of keys and values and of the logits while windows are written, fp32."""
    graph, length = job.graph, job.recipe.calibration.seqlen
    cache = 2 * len(graph.blocks) * graph.heads * graph.head_dim * length
    return 4 * min(AT_ONCE, job.recipe.calibration.nsamples) * (cache + 4 * job.store.text_config.vocab_size)


def _some_tokens(probe: CostProbe) -> tuple[float, int]:
    """Lets the model write a few tokens of the first windows."""
    job = probe.job
    started = time.perf_counter()
    model = _whole_model(job)
    building = time.perf_counter() - started
    first, seeds = _first(job)
    length = min(job.recipe.calibration.seqlen, len(job.bos) + 1 + _MEASURED)
    started = time.perf_counter()
    _write(job, model, first[:AT_ONCE], seeds[:AT_ONCE], 0, length, lambda: None)
    each = (time.perf_counter() - started) / max(1, length - len(job.bos) - 1)
    batches = -(-job.recipe.calibration.nsamples // AT_ONCE)
    return building + each * batches * _tokens_to_write(job), _writing(job)


def _one_run(probe: CostProbe) -> tuple[float, int]:
    """Runs some windows through all blocks. The whole stage holds the hidden states of more windows."""
    job, sample = probe.job, probe.sample
    assert job.tokens is not None
    assert job.candidates is not None
    started = time.perf_counter()
    channel_peaks(job.store, sample, job.compute_dtype, job.output.device)
    seconds = time.perf_counter() - started
    rows = 0 if job.output.offload else job.tokens.numel() - sample.numel()
    hidden = rows * job.graph.hidden * job.compute_dtype.itemsize
    peaks = 4 * len(job.candidates) * len(job.graph.blocks) * job.graph.hidden
    return seconds * len(job.candidates) / len(sample), hidden + 2 * peaks
