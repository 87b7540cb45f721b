"""Blocks that are rounded side by side, each in a process of its own, here or on other machines.

Where blocks are calibrated on what the unrounded model would give them (``calibration.inputs: original``), none waits
for another. This process carries the text through the unrounded blocks, which is quick, and puts what enters each of
them on the disk; workers round the blocks and keep them in the run's journal, as a run on its own would have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch

from gyroquant.allocation import ALLOCATION, give
from gyroquant.blocks import block_name, carry, folded_block, keep_block, writer_of
from gyroquant.calibration.stream import Stream
from gyroquant.environment import peak_memory_bytes, steady_memory, versions
from gyroquant.errors import GyroquantError, InputError
from gyroquant.job import Job, Output, grids_of, plan_all
from gyroquant.journal import Journal, JournalError
from gyroquant.models.prove import folded_outer
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.source import open_model
from gyroquant.planning import dump_plan, load_plan
from gyroquant.pool import Pool, Workers, make_pool
from gyroquant.processes import DiedError, Processes, run_apart, serve
from gyroquant.progress import Stages
from gyroquant.recipe import parse

_COMMON = "common"


@torch.no_grad()
def round_apart(job: Job, journal: Journal, workers: Workers, progress: Stages) -> None:
    """Has every block rounded that the journal has not, several at once; the journal then has all of them.

    Raises InputError with the reason when a block cannot be rounded, ChildProcessError when its worker dies for good.
    """
    missing = [i for i in range(len(job.graph.blocks)) if journal.get(block_name(i)) is None]
    if not missing:
        return
    _keep_common(job, journal)
    stream = _stream(job)
    pool = make_pool(work_apart, workers)
    running, peak = dict[Future[dict[str, Any]], int](), 0
    try:
        with progress.stage("round side by side", len(missing)) as advance:
            for i in range(max(missing) + 1):
                if i in missing:
                    while len(running) >= pool.slots(peak):
                        peak = max(peak, _take(running, journal))
                        advance()
                    running[_start(job, i, journal, stream, pool)] = i
                if stream is not None:
                    carry(job, i, stream, folded_block(job, i))
            while running:
                peak = max(peak, _take(running, journal))
                advance()
    finally:
        pool.close()


def _stream(job: Job) -> Stream | None:
    """The calibration text at the first block, if it is needed."""
    if not job.needs_stream:
        return None
    assert job.tokens is not None
    outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
    return job.stream(BlockRunner(job.store.skeleton(), job.graph), job.tokens, outer, job.output.offload)


def _keep_common(job: Job, journal: Journal) -> None:
    """Keeps what all workers need: maps and tokens."""
    maps, arrays = dump_plan(job.plan)
    if job.tokens is not None:
        arrays["tokens"] = job.tokens
    journal.put(_COMMON, arrays, {"maps": maps})


def _start(job: Job, index: int, journal: Journal, stream: Stream | None, pool: Pool) -> Future[dict[str, Any]]:
    name = block_name(index)
    recipe = job.recipe.to_dict()
    recipe["calibration"]["dtype"] = str(job.compute_dtype).removeprefix("torch.")  # not what another machine has
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
        "threads": pool.threads,
    }
    return pool.submit(spec, journal.folder / "logs" / f"{name}.log")


def _take(running: dict[Future[dict[str, Any]], int], journal: Journal) -> int:
    """Waits for a block; returns the largest memory that its worker took."""
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


def work_apart(spec: Mapping[str, Any], log: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Rounds a block in a process of its own, which is started once more when it is killed; returns what it took, the
    `problem` that is the user's to mend, what is wrong with the `journal`, or of what it `died`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return run_apart(__name__, spec, Path(scratch), log, processes)
        except DiedError as error:
            return {"died": str(error)}


def round_one(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds the block that a spec asks for, and keeps it in the journal of the run."""
    steady_memory()
    journal, there = Journal(Path(spec["out"]), head=spec["head"]), _versions()
    try:
        for name, here in spec["versions"].items():
            if there[name] != here:
                raise InputError(f"its machine has {name} {there[name]}, the one that gives out the blocks {here}")
        job = _job(spec, journal)
        with evaluating(job.store.skeleton()), torch.no_grad():
            stream = _stream(job)
            if stream is not None:
                journal.get_states(spec["inputs"], stream.states)
            keep_block(job, spec["index"], writer_of(job), journal, stream, apart=True)
    except JournalError as error:
        return {"journal": str(error)}
    except GyroquantError as error:
        return {"problem": str(error)}
    return {"peak_memory_bytes": peak_memory_bytes()}


def _versions() -> dict[str, str]:
    """What has to be the same on all machines, for the same bytes."""
    return {name: str(versions()[name]) for name in ("gyroquant", "torch", "transformers", "cpu_capability")}


def _job(spec: Mapping[str, Any], journal: Journal) -> Job:
    """The job that a spec belongs to, as this process needs it."""
    common, arrays = journal.get(_COMMON), journal.tensors(_COMMON)
    assert common is not None
    recipe, store = parse(dict(spec["recipe"])), open_model(spec["model"])
    _, targets, quantizers = plan_all(store.graph, recipe)
    tokens = arrays.pop("tokens", None)
    plan = load_plan(store.graph, recipe, common["maps"], arrays)
    output = Output(
        Path(spec["out"]),
        getattr(torch, spec["dtype"]),
        dense=spec["dense"],
        device=torch.device(spec["device"]),
        offload=None if spec["offload"] is None else Path(spec["offload"]),
    )
    job = Job(store, recipe, plan, targets, output, None, quantizers, None, tokens, grids_of(recipe, targets))
    allocation = journal.read(ALLOCATION)
    if allocation is not None:
        give(job, allocation["result"]["found"]["bits"])
    return job


__all__ = ["round_apart", "round_one", "work_apart"]

if __name__ == "__main__":
    serve(round_one)
