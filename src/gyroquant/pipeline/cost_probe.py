"""Measures time and memory of parts of a job: one block, a few batches of text, a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.system.environment import forget_peak, peak_memory_bytes
from gyroquant.system.progress import Progress

_BATCHES = 2  # batches of calibration text for the measurement of the first block


@dataclass(frozen=True)
class StageCost:
    """The cost of a whole stage: its peak of resident memory in bytes, and its seconds (None if unknown)."""

    peak_memory_bytes: int
    seconds: float | None = None


class CostProbe:
    """Measures the stages of a job, and holds data that several stages need.

    - `model`: the sizes at the start.
    - `forward_seconds`: seconds for one sequence through one block. The stage `quantize` measures them.
    """

    def __init__(self, job: Job):
        self.job, self.model = job, MemoryModel(job)
        self.forward_seconds = 0.0

    def measured(self, part: Callable[[], tuple[float, int]]) -> StageCost:
        """The cost of a stage, measured by running `part`.

        `part` returns the seconds of the whole stage, and the bytes that the whole stage holds in addition to `part`.
        """
        forget_peak()
        seconds, beyond = part()
        return StageCost(peak_memory_bytes() + beyond, seconds)

    @property
    def steps(self) -> int:
        """The number of batches of the whole calibration text."""
        assert self.job.tokens is not None
        return -(-len(self.job.tokens) // _per_batch(self.job.tokens))

    @property
    def sample(self) -> torch.Tensor:
        """A few batches of the calibration text."""
        assert self.job.tokens is not None
        return self.job.tokens[: _BATCHES * _per_batch(self.job.tokens)]

    @cached_property
    def _around(self) -> tuple[Stream | None, StageCost]:
        """Folds the parameters around the blocks and casts them to the dtype of the output.

        Returns the stream of the sample, and the cost.
        """
        job, stream = self.job, None
        forget_peak()
        started = time.perf_counter()
        outer = job.plan.read_outer(job.store)
        if job.needs_stream or job.recipe.finetune is not None:
            stream = job.stream(BlockRunner.of(job.store, job.plan.online), self.sample, outer)
        saved = {name: tensor.to(job.output.dtype) for name, tensor in outer.items()}
        for tensor in saved.values():
            tensor.isfinite().all()
        seconds = time.perf_counter() - started
        return stream, StageCost(peak_memory_bytes() + self.missing_hidden(stream), seconds)

    @property
    def stream(self) -> Stream | None:
        """The stream of the sample; None if the job needs no stream."""
        return self._around[0]

    @property
    def around(self) -> StageCost:
        """The cost of folding and saving the parameters around the blocks."""
        return self._around[1]

    def scale(self, stream: Stream | None) -> float:
        """The length of the whole text divided by that of a stream's text; 0 without a stream."""
        return 0.0 if stream is None or self.job.tokens is None else len(self.job.tokens) / len(stream.input_ids)

    def missing_hidden(self, stream: Stream | None) -> int:
        """Bytes of hidden states that the whole run holds in addition to those of the measurement."""
        job = self.job
        if stream is None or stream.hidden is None or job.tokens is None or not job.needs_stream or job.output.offload:
            return 0
        rows = len(job.tokens) - len(stream.input_ids)
        copies = 1 if stream.original is None else 2
        return copies * rows * stream.hidden[0].numel() * stream.hidden.element_size()


def _per_batch(tokens: torch.Tensor) -> int:
    """The number of windows that run through a block at once, as in `Stream`."""
    return max(1, 4096 // tokens.shape[1])


class Ticks(Progress):
    """Records the times of all progress steps, of any stage."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def tick(self) -> None:
        """Records a step."""
        self.times.append(time.perf_counter())

    def stage(self, name: str, steps: int) -> Any:
        """Records the steps of this stage too."""
        return nullcontext(self.tick)

    def last(self) -> float:
        """Seconds of the last step; 0 if there was none."""
        return self.times[-1] - self.times[-2] if len(self.times) > 1 else 0.0
