"""A quantization from start to end: runs every stage, keeps a journal, and puts the output folder in place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gyroquant.calibration.text import bos_text
from gyroquant.formats.model_card import metadata_of, write_card
from gyroquant.formats.output_folder import check_destination, recover
from gyroquant.maps import dump
from gyroquant.models.execution.runner import evaluating
from gyroquant.models.stores.fingerprint import fingerprint
from gyroquant.models.stores.ranges import Ranges
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.planning import replaced_grids
from gyroquant.pipeline.resources import check_fits
from gyroquant.pipeline.stages import STAGES, RunContext
from gyroquant.system.checksums import CHECKSUM_FILE, write_checksums
from gyroquant.system.environment import peak_memory_bytes, steady_memory, versions
from gyroquant.system.journal import Journal
from gyroquant.system.progress import Advance, Progress


def run(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Runs every stage of a job. Returns the manifest, which is also written as `gyroquant.json`.

    The destination appears only when it is complete. Until then, a journal beside it holds the finished work: after a
    crash, the same job continues from there and ends with the same bytes. The run has its own state and does not change
    that of `job`.

    Raises ProofError, before anything is written to the destination, if the fold is not exact. Raises InputError if
    another process writes the destination, or if another job was left unfinished there.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    check_fits(job)
    steady_memory()
    job = Job.begin(job.spec)
    warnings = job.state.warnings
    with _threads(job), Journal(job.output.folder, job.output.fresh) as journal, evaluating(job.store.skeleton()):
        recover(job.output.folder)
        warnings += [*job.store.notes, *job.spec.planned.left_out]
        warnings += replaced_grids({**job.targets, **job.tables}, job.spec.grid)
        with progress.stage("fingerprint the model", len(job.store.shapes)) as advance:
            model = _fingerprint(job, advance)
        facts = _facts(job, model)
        manifest = _already_done(job, journal, facts)
        if manifest is not None:
            progress.warn(f"{job.output.folder} was finished already: only its journal was left to be removed")
            return manifest
        if journal.begin(facts):
            progress.warn(f"continuing where an earlier run was stopped ({journal.folder})")
        with ExitStack() as opened:
            context = RunContext(job, journal, progress, opened)
            seconds = _run_stages(context)
            manifest = _manifest(job, model)
            manifest["stage_seconds"] = seconds
            manifest["seconds"] = round(time.perf_counter() - started, 3)
            manifest["peak_memory_bytes"] = peak_memory_bytes()
            folder = context.folder
            folder.json("gyroquant.json", manifest)
            write_card(folder.partial, manifest, metadata_of(job.store))
            write_checksums(folder.partial)
            journal.finish(folder.partial / CHECKSUM_FILE)
            folder.commit()
        journal.close()
    for text in warnings:
        progress.warn(text)
    return manifest


def _run_stages(context: RunContext) -> dict[str, float]:
    """Runs every stage that the job has. Returns the seconds that each took, by its name."""
    seconds: dict[str, float] = {}
    for stage in STAGES:
        if stage.applies(context.job):
            started = time.perf_counter()
            stage.run(context)
            seconds[stage.name] = round(time.perf_counter() - started, 3)
    return seconds


def _fingerprint(job: Job, advance: Advance) -> str:
    """The model's fingerprint. The same pass refuses parameters that do not fit the output's dtype.

    Rounded parameters are checked too, because they are decoded to that dtype. Parameters that maps change are checked
    after folding. Carried tensors keep their own dtype and are not checked.
    """
    ranges = Ranges(job.output.dtype)
    result = fingerprint(job.store, advance, ranges.add)
    changed = {name for name, edits in job.plan.edits.items() if edits} | set(job.graph.carried)
    job.state.warnings += ranges.check(name for name in job.store.shapes if name not in changed)
    return result


@contextmanager
def _threads(job: Job) -> Iterator[None]:
    """Makes this process compute with as many threads as its workers, because the number of threads changes the
    rounding of sums.
    """
    before = torch.get_num_threads()
    if job.output.workers is not None:
        torch.set_num_threads(job.output.workers.each)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _already_done(job: Job, journal: Journal, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest, if the same job has put the folder in place and was killed before it removed the journal."""
    out = job.output.folder
    if not journal.finished(out / CHECKSUM_FILE):
        return None
    same = journal.has_finished(facts) and not job.output.fresh
    journal.close()
    if same:
        manifest: dict[str, Any] = json.loads((out / "gyroquant.json").read_text(encoding="utf-8"))
        return manifest
    check_destination(out, job.output.overwrite)
    return None


def _facts(job: Job, model: str) -> dict[str, Any]:
    """Everything that the result depends on. The journal compares it to recognize the run that was interrupted."""
    recipe, output, machine = job.recipe.to_dict(), job.output, versions()
    recipe["calibration"]["dtype"] = str(job.compute_dtype)  # `auto` depends on the machine
    for section in (recipe, machine):
        for label in ("name", "description", "platform"):
            section.pop(label, None)
    tokens = job.tokens if job.candidates is None else job.candidates
    text = None if tokens is None else hashlib.sha256(tokens.cpu().contiguous().numpy().data).hexdigest()
    output_facts = {"dtype": str(output.dtype), "dense": output.dense, "device": str(output.device)}
    return {"model": model, "text": text, "recipe": recipe, "output": output_facts, "versions": machine}


def _rotation(job: Job) -> str:
    """How R1 is used: `fused` into the weights, `online`, or `unrotated` if it is not used."""
    online = [online for site, _, online in job.plan.folded if site.name == "R1"]
    return "unrotated" if not online else "online" if any(online) else "fused"


def _manifest(job: Job, model: str) -> dict[str, Any]:
    """The manifest: a description of the job, and the `results` of its stages."""
    recipe, text, results = job.recipe, job.text, job.state.results
    return {
        "gyroquant": versions()["gyroquant"],
        "model": job.store.label,
        "model_sha256": model,
        "model_type": job.store.config.model_type,
        "source_quantization": job.store.source_quantization,
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "text": None if text is None else text.about() | {"bos": bos_text(job.bos, job.tokenizer)},
        "calibration_dtype": str(job.compute_dtype).removeprefix("torch.") if job.needs_stream else None,
        "described_by": job.graph.architecture.name,
        "rotation": _rotation(job),
        "sites": [{"site": site.label, "map": dump(m, {}), "online": online} for site, m, online in job.plan.folded],
        "untied": results["untied"],
        "proof": results["proof"],
        "bits": results["bits"],
        "layers": results["layers"],
        "warnings": job.state.warnings,
        "versions": versions(),
        "opened": results["opened"],
        "learned": results.get("learned"),
        "allocation": results.get("allocation"),
        "finetuned": results.get("finetuned"),
        **({"windows": results["windows"]} if "windows" in results else {}),
    }
