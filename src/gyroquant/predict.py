"""How long a quantization will take and how much memory it will need, measured on its first block."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from gyroquant.calibration.stream import Stream
from gyroquant.environment import peak_memory_bytes
from gyroquant.job import Job, expected_bytes
from gyroquant.models.fold import fold
from gyroquant.models.online import attached
from gyroquant.models.prove import folded_outer, prove
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.pipeline import proof_sample, round_block

_BATCHES = 2  # batches of calibration text that the first block is measured on


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of a whole run; `disk_bytes` is the size of the result."""

    seconds: float
    peak_memory_bytes: int
    disk_bytes: int


@torch.no_grad()
def predict(job: Job) -> Prediction:
    """Runs the stations on one block and some of the text, and scales up what grows with blocks and tokens."""
    model, graph = job.store.skeleton(), job.graph
    blocks = len(graph.blocks)
    with evaluating(model):
        proving = 0.0
        if job.plan.edits or job.plan.online:
            started = time.perf_counter()
            prove(job.store, job.plan, BlockRunner(model, graph), proof_sample(job)[:1], threshold=float("inf"))
            proving = (time.perf_counter() - started) * len(proof_sample(job))
        outer = folded_outer(job.plan, job.store.read(graph.outer_params()))
        stream = _short_stream(job, BlockRunner(model, graph), outer)
        started = time.perf_counter()
        tensors = fold(job.plan, job.store.read(graph.block_params(0)))
        reading = time.perf_counter() - started
        running = [0.0]

        def tick() -> None:
            running.append(time.perf_counter())

        running[0] = started = time.perf_counter()
        _, _, deployed = round_block(job, 0, graph.blocks[0], tensors, stream, tick, [])
        whole = time.perf_counter() - started
        observed = running[-1] - running[0]
        forward = 0.0
        if stream:
            started = time.perf_counter()
            with attached(model, job.running_in(0)):
                stream.run(0, deployed)
            forward = time.perf_counter() - started
    scale = _scale(job, stream)
    block = reading + (whole - observed) + scale * (observed + forward)
    return Prediction(proving + blocks * block, peak_memory_bytes() + _missing_hidden(job, stream), expected_bytes(job))


def _short_stream(job: Job, runner: BlockRunner, outer: dict[str, torch.Tensor]) -> Stream | None:
    if not job.needs_stream:
        return None
    assert job.tokens is not None
    batch = max(1, 4096 // job.tokens.shape[1])
    paired = job.recipe.weights.solver.needs_original
    stream = Stream(runner, job.tokens[: _BATCHES * batch], outer, job.compute_dtype, None, job.output.device, paired)
    stream.free_outer()
    return stream


def _scale(job: Job, stream: Stream | None) -> float:
    return 0.0 if stream is None or job.tokens is None else len(job.tokens) / len(stream.input_ids)


def _missing_hidden(job: Job, stream: Stream | None) -> int:
    """Bytes of hidden states that the whole run holds beyond what the measurement held."""
    if stream is None or stream.hidden is None or job.tokens is None or job.output.offload:
        return 0
    rows = len(job.tokens) - len(stream.input_ids)
    copies = 1 if stream.original is None else 2
    return copies * rows * stream.hidden[0].numel() * stream.hidden.element_size()


__all__ = ["Prediction", "predict"]
