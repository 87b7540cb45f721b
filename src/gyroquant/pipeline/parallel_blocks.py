"""Rounds blocks in parallel, each in a separate process, on this machine or on others.

With ``calibration.inputs: original``, blocks are calibrated on their inputs in the unrounded model, so no block waits
for another. This process carries the text through the unrounded blocks, which is fast, and writes the input of each
block to the disk. Workers round the blocks and write them to the run's journal, as a run without workers does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch

from gyroquant.calibration.stream import Stream
from gyroquant.errors import GyroquantError, InputError
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.bit_allocation import ALLOCATION, apply_bits
from gyroquant.pipeline.folds import dump_plan, load_plan
from gyroquant.pipeline.job import Job, JobSpec, Output
from gyroquant.pipeline.planning import plan_all
from gyroquant.pipeline.quantize_model import block_name, carry, folded_block, keep_block, writer_for
from gyroquant.pipeline.token_weights import TOKEN_WEIGHTS, restore
from gyroquant.recipes.schema import parse
from gyroquant.system.environment import peak_memory_bytes, steady_memory, versions
from gyroquant.system.journal import Journal, JournalError
from gyroquant.system.progress import Progress
from gyroquant.system.subprocesses import DiedError, Processes, run_in_subprocess, serve
from gyroquant.system.worker_pool import Pool, Workers, make_pool

_COMMON = "common"


@torch.no_grad()
def quantize_blocks_in_parallel(job: Job, journal: Journal, workers: Workers, progress: Progress) -> None:
    """Rounds every block that is not in the journal, several at once, and writes them there.

    Raises InputError, with the reason, if a block cannot be rounded, and ChildProcessError if its worker process fails.
    """
    missing = [i for i in range(len(job.graph.blocks)) if journal.get(block_name(i)) is None]
    if not missing:
        return
    _write_common(job, journal)
    stream = _stream(job)
    pool = make_pool(run_block_worker, workers)
    running, peak = dict[Future[dict[str, Any]], int](), 0
    try:
        with progress.stage("quantize: in parallel", len(missing)) as advance:
            for i in range(max(missing) + 1):
                if i in missing:
                    while len(running) >= pool.slots(peak):
                        peak = max(peak, _wait_for_block(running, journal))
                        advance()
                    running[_submit(job, i, journal, stream, pool)] = i
                if stream is not None:
                    carry(job, i, stream, folded_block(job, i))
            while running:
                peak = max(peak, _wait_for_block(running, journal))
                advance()
    finally:
        pool.close()


def _stream(job: Job) -> Stream | None:
    """The calibration text at the input of the first block; None if the job needs no stream."""
    if not job.needs_stream:
        return None
    assert job.tokens is not None
    outer = job.plan.read_outer(job.store)
    return job.stream(BlockRunner.of(job.store, job.plan.online), job.tokens, outer, job.output.offload)


def _write_common(job: Job, journal: Journal) -> None:
    """Writes the data for all workers to the journal: maps and tokens."""
    maps, arrays = dump_plan(job.plan)
    if job.tokens is not None:
        arrays["tokens"] = job.tokens
    journal.put(_COMMON, arrays, {"maps": maps})


def _submit(job: Job, index: int, journal: Journal, stream: Stream | None, pool: Pool) -> Future[dict[str, Any]]:
    name = block_name(index)
    recipe = job.recipe.to_dict()
    recipe["calibration"]["dtype"] = str(job.compute_dtype).removeprefix(
        "torch."
    )  # so that all machines use the same dtype
    spec = {
        "model": str(Path(job.store.label).absolute()),
        "out": str(journal.out),
        "head": journal.head,
        "versions": _versions(),
        "recipe": recipe,
        "dtype": str(job.output.dtype).removeprefix("torch."),
        "dense": job.output.dense,
        "device": str(job.output.device),
        "offload": None if job.output.offload is None else str(job.output.offload.absolute()),
        "index": index,
        "inputs": [] if stream is None else journal.put_states(f"into-{name}", stream.states),
        "arguments": [] if stream is None else stream.arguments.layout,
        "threads": pool.threads,
    }
    return pool.submit(spec, journal.folder / "logs" / f"{name}.log")


def _wait_for_block(running: dict[Future[dict[str, Any]], int], journal: Journal) -> int:
    """Waits for a block. Returns its worker's peak of memory, in bytes."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    future = done.pop()
    index = running.pop(future)
    answer = future.result()
    if "journal" in answer:
        raise JournalError(answer["journal"])
    if "problem" in answer:
        raise InputError(f"block {index} was not rounded: {answer['problem']}")
    if "died" in answer:
        raise ChildProcessError(f"block {index} was not rounded: {answer['died']}")
    journal.drop_states(f"into-{block_name(index)}")
    return int(answer["peak_memory_bytes"])


def run_block_worker(spec: Mapping[str, Any], log: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Rounds a block in a separate process, which is started once more if it is killed.

    Returns the worker's `peak_memory_bytes`, or a text under one of three keys: `problem` (an error that the user can
    correct), `journal` (an error of the journal), `died` (why the process ended).
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return run_in_subprocess(__name__, spec, Path(scratch), log, processes)
        except DiedError as error:
            return {"died": str(error)}


def quantize_one_block(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds the block of a spec, and writes it to the journal of the run."""
    steady_memory()
    journal, worker_versions = Journal(Path(spec["out"]), head=spec["head"]), _versions()
    try:
        for name, expected in spec["versions"].items():
            if worker_versions[name] != expected:
                raise InputError(
                    f"its machine has {name} {worker_versions[name]}, and the run needs {expected}: install it there"
                )
        job = _job(spec, journal)
        with evaluating(job.store.skeleton()), torch.no_grad():
            stream = _stream(job)
            if stream is not None:
                stream.arguments.allocate(spec["arguments"])
                journal.get_states(spec["inputs"], stream.states)
            keep_block(job, spec["index"], writer_for(job), journal, stream, apart=True)
    except JournalError as error:
        return {"journal": str(error)}
    except GyroquantError as error:
        return {"problem": str(error)}
    return {"peak_memory_bytes": peak_memory_bytes()}


def _versions() -> dict[str, str]:
    """The versions that must agree on all machines, so that the bytes are the same."""
    return {name: str(versions()[name]) for name in ("gyroquant", "torch", "transformers", "cpu_capability")}


def _job(spec: Mapping[str, Any], journal: Journal) -> Job:
    """The job of a spec, with the data that rounding one block needs."""
    common, arrays = journal.get(_COMMON), journal.tensors(_COMMON)
    assert common is not None
    recipe, store = parse(dict(spec["recipe"])), open_model(spec["model"])
    planned, targets, quantizers = plan_all(store.graph, recipe)
    tokens = arrays.pop("tokens", None)
    output = Output(
        Path(spec["out"]),
        getattr(torch, spec["dtype"]),
        dense=spec["dense"],
        device=torch.device(spec["device"]),
        offload=None if spec["offload"] is None else Path(spec["offload"]),
    )
    job = Job.begin(JobSpec(store, recipe, planned, targets, output, quantizers=tuple(quantizers), tokens=tokens))
    job.state.plan = load_plan(store.graph, recipe, common["maps"], arrays)
    allocation = journal.read(ALLOCATION)
    if allocation is not None:
        apply_bits(job, allocation["result"]["found"])
    if journal.get(TOKEN_WEIGHTS) is not None:
        restore(job, journal)
    return job


__all__ = ["quantize_blocks_in_parallel", "quantize_one_block", "run_block_worker"]

if __name__ == "__main__":
    serve(quantize_one_block)
