"""The one place that knows the order of the stations: text, batches, choose, fold, prove, round, pack, save."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gyroquant.allocation import ALLOCATION, allocate, give
from gyroquant.apart import round_apart
from gyroquant.blocks import round_model, writer_of
from gyroquant.calibration.measure import Want, measure
from gyroquant.calibration.text import (
    Text,
    TokenBatch,
    bos_text,
    calibration_windows,
    load_text,
    token_stream,
)
from gyroquant.elsewhere import round_elsewhere
from gyroquant.environment import peak_memory_bytes, steady_memory, versions
from gyroquant.errors import InputError
from gyroquant.estimate import check_fits
from gyroquant.export.folder import OutputFolder, check_destination, mend
from gyroquant.export.hf import keep_online
from gyroquant.export.memory import write_folded
from gyroquant.export.writer import Writer
from gyroquant.integrity import FILE as SUMS
from gyroquant.integrity import seal
from gyroquant.job import Job, learning_setting, plan_all
from gyroquant.journal import Journal
from gyroquant.learning import finish, learn
from gyroquant.learning.rotations import FILE_NAME, rotations_of, write_rotations
from gyroquant.maps import dump
from gyroquant.models.adapters import check_plain
from gyroquant.models.fingerprint import fingerprint
from gyroquant.models.fold import FoldPlan
from gyroquant.models.opened import Comparison, compare_with_transformers
from gyroquant.models.packed import PackedStore
from gyroquant.models.prove import Proof, prove
from gyroquant.models.ranges import Ranges
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.source import open_model
from gyroquant.models.store import ModuleStore, WeightStore
from gyroquant.planning import dump_plan, load_plan, plan_folds
from gyroquant.progress import Advance, Stages
from gyroquant.recipe import Recipe, load_recipe
from gyroquant.refusals import check_folded, check_seqlen

Calibration = str | Path | Sequence[str | Mapping[str, Any]] | Tensor


def _trivial_proof(plan: FoldPlan, threshold: float) -> Proof:
    """Nothing is folded, so the folded model is the original, bit for bit."""
    return Proof(0.0, 0, 0.0, threshold, 0, (0.0,) * len(plan.graph.blocks))


def _prove(store: WeightStore, plan: FoldPlan, tokens: Tensor, recipe: Recipe, progress: Stages) -> Proof:
    if not plan.edits and not plan.online:
        return _trivial_proof(plan, recipe.proof.threshold)
    runner = BlockRunner(store.skeleton(), plan.graph)
    with progress.stage("prove", len(plan.graph.blocks)) as advance:
        return prove(store, plan, runner, tokens, recipe.proof.threshold, lambda done, total: advance())


def compare(store: WeightStore, progress: Stages) -> Comparison:
    """Holds a model as it was read against what transformers runs; see `compare_with_transformers`."""
    with progress.stage("compare with transformers", len(store.graph.blocks)) as advance:
        return compare_with_transformers(store, advance)


def _measured_plan(
    store: WeightStore,
    recipe: Recipe,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    progress: Stages,
    offload: Path | None = None,
) -> FoldPlan:
    """The maps that a recipe chooses by what the original model does with `tokens`, shape (samples, length)."""

    def look(plan: FoldPlan, wants: list[Want]) -> None:
        measure(store, plan, wants, tokens, progress, dtype, device, offload)

    return plan_folds(store.graph, recipe, look)


def transform(
    model: PreTrainedModel,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    progress: Stages | None = None,
) -> Proof:
    """Folds a recipe's maps into a model in memory, after proving on tokens that it stays the same function.

    Maps are measured and learned as the recipe says; nothing is rounded, weights, activations and cache stay exact.

    `calibration` is a text, with `tokenizer`, or token ids of shape (samples, length), which are taken as they are;
    without it the proof is made on random tokens. A recipe that measures or learns takes `calibration.nsamples` windows
    of `calibration.seqlen` tokens (given ids have to be that long), the proof `proof.nsamples` of `proof.seqlen` (of
    given ids the first). Raises InputError where there are fewer, or where the model knows fewer positions, and
    UnsupportedModelError (of which ProofError is one) when it cannot be exact, each time with the model untouched.
    Weights keep their dtype; the proof is made in fp32.
    """
    recipe, progress = load_recipe(recipe), progress or Stages()
    check_plain(model)
    store = ModuleStore(model)
    plan = plan_folds(store.graph, recipe)
    compare(store, progress)
    if recipe.learn is not None:  # only then does it matter what would be rounded
        plan, targets, quantizers = plan_all(store.graph, recipe)
    source = _source(calibration, tokenizer)
    proof_tokens = _proof_tokens(model, recipe, source, tokenizer)
    with evaluating(model):
        if recipe.measures:
            tokens = _windows_in_memory(model, recipe, source, tokenizer)
            plan = _measured_plan(store, recipe, tokens, torch.float32, model.device, progress)
        if recipe.learn is not None:
            text = None if source is None else _windows_in_memory(model, recipe, source, tokenizer)
            setting = learning_setting(recipe, text, targets, quantizers, torch.float32)
            plan = learn(store, plan, recipe.learn, setting, progress).plan
        proof = _prove(store, plan, proof_tokens, recipe, progress)
    write_folded(model, plan)
    keep_online(model, plan.online)
    return proof


def _proof_tokens(model: Any, recipe: Recipe, source: Text | TokenBatch | None, tokenizer: Any) -> Tensor:
    """The tokens that the proof in memory is made on: as many as the recipe says, never fewer."""
    settings, drawn = recipe.proof, recipe.calibration
    vocabulary = model.config.get_text_config().vocab_size
    if isinstance(source, TokenBatch):
        tokens = source.checked(vocabulary).cut(settings.nsamples, settings.seqlen, "proof")
    check_seqlen(model.config.get_text_config(), settings.seqlen, "proof.seqlen")
    if isinstance(source, TokenBatch):
        return tokens.to(model.device)
    if source is not None:
        stream = token_stream(source, tokenizer, vocabulary, drawn.add_bos)
        tokens = stream.sample(settings.nsamples, settings.seqlen, drawn.seed).ids
    else:
        generator = torch.Generator().manual_seed(recipe.seed)
        tokens = torch.randint(0, vocabulary, (settings.nsamples, settings.seqlen), generator=generator)
    return tokens.to(model.device)


def _windows_in_memory(model: Any, recipe: Recipe, source: Text | TokenBatch | None, tokenizer: Any) -> Tensor:
    """The windows that a recipe calibrates on, for a model in memory."""
    settings = recipe.calibration
    if source is None:
        raise InputError("this recipe measures the model on text: transform(..., calibration=..., tokenizer=...)")
    check_seqlen(model.config.get_text_config(), settings.seqlen)
    amount = (settings.nsamples, settings.seqlen, settings.seed, settings.add_bos)
    return calibration_windows(source, tokenizer, model.config.get_text_config().vocab_size, *amount).ids.to(
        model.device
    )


def _source(calibration: Calibration | None, tokenizer: Any) -> Text | TokenBatch | None:
    if calibration is None:
        return None
    if isinstance(calibration, Tensor):
        return TokenBatch("the token ids", "", calibration)
    if tokenizer is None:
        raise InputError("a calibration text needs its tokenizer: transform(..., tokenizer=...)")
    return load_text(calibration)


def run(job: Job, progress: Stages | None = None) -> dict[str, Any]:
    """Proves, rounds and saves; returns the manifest that it also writes as `gyroquant.json`.

    The destination appears only when all of it is there. Raises ProofError before anything is written when the fold is
    not exact. What is done lies in a journal beside the destination until then: after a crash, the same job goes on
    from there and ends with the same bytes. Raises InputError when another process writes the destination, or when
    another job was left unfinished there.
    """
    progress = progress or Stages()
    started = time.perf_counter()
    check_fits(job)
    steady_memory()
    journal = Journal(job.output.folder, job.output.fresh)
    with _threads(job), journal, evaluating(job.store.skeleton()):
        mend(job.output.folder)
        warnings = list(job.store.notes)
        with progress.stage("look at the model", len(job.store.shapes)) as advance:
            model = _look(job, warnings, advance)
        facts = _facts(job, model)
        there = _already(job, journal, facts)
        if there is not None:
            progress.warn(f"{job.output.folder} was done already: only its journal was left to be removed")
            return there
        if journal.begin(facts):
            progress.warn(f"going on from where a run before was stopped ({journal.folder})")
        opened = journal.stage("opened", lambda: compare(job.store, progress).to_dict())
        _measure(job, journal, progress)
        learned = _learn(job, journal, progress)
        warnings += check_folded(job.store, job.plan, job.targets, job.output.dtype)
        proof = journal.stage("proof", lambda: _prove_job(job, progress).to_dict())
        allocation = _allocate(job, journal, progress, warnings)
        job.rounded = round_elsewhere(job, progress)
        with OutputFolder(job.output.folder, job.output.overwrite) as folder:
            if job.output.workers is not None:
                round_apart(job, journal, job.output.workers, progress)
            writer = writer_of(job, folder)
            layers = round_model(job, writer, journal, progress, warnings)
            writer.online([*job.plan.online, *job.quantizers])
            writer.carry()
            folder.merge()
            manifest = _manifest(job, model, proof, layers, writer, warnings)
            writer.finish(job.tokenizer, manifest["untied"])
            manifest["opened"], manifest["learned"], manifest["allocation"] = opened, learned, allocation
            manifest["finished"] = _finish(job, folder.partial, journal, progress)
            _write_rotations(job, folder.partial)
            manifest["seconds"] = round(time.perf_counter() - started, 3)
            manifest["peak_memory_bytes"] = peak_memory_bytes()
            folder.json("gyroquant.json", manifest)
            seal(folder.partial)
            journal.finish(folder.partial / SUMS)
            folder.commit()
        journal.close()
    for text in warnings:
        progress.warn(text)
    return manifest


def _look(job: Job, warnings: list[str], advance: Advance) -> str:
    """The model's fingerprint. Refuses, in the same pass, parameters that the output's dtype does not hold,
    rounded ones too: whoever opens the folder has them in that dtype. What maps change is looked at when it is changed,
    and what is carried along keeps its own.
    """
    ranges = Ranges(job.output.dtype)
    found = fingerprint(job.store, advance, ranges.add)
    changed = {name for name, edits in job.plan.edits.items() if edits} | set(job.graph.carried)
    warnings += ranges.check(name for name in job.store.shapes if name not in changed)
    return found


@contextmanager
def _threads(job: Job) -> Iterator[None]:
    """Has this process compute with as many threads as its workers do: sums come out another way with another number
    of them.
    """
    before = torch.get_num_threads()
    if job.output.workers is not None:
        torch.set_num_threads(job.output.workers.each)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _already(job: Job, journal: Journal, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that the same job has put in place, and died before it removed the journal."""
    out = job.output.folder
    if not journal.finished(out / SUMS):
        return None
    same = journal.has_finished(facts) and not job.output.fresh
    journal.close()
    if same:
        found: dict[str, Any] = json.loads((out / "gyroquant.json").read_text(encoding="utf-8"))
        return found
    check_destination(out, job.output.overwrite)
    return None


def _facts(job: Job, model: str) -> dict[str, Any]:
    """Everything that the result depends on, to know a run again by."""
    recipe, output, machine = job.recipe.to_dict(), job.output, versions()
    recipe["calibration"]["dtype"] = str(job.compute_dtype)  # what `auto` stands for differs by the machine
    for told in (recipe, machine):
        for label in ("name", "description", "platform"):
            told.pop(label, None)
    text = None if job.tokens is None else hashlib.sha256(job.tokens.cpu().contiguous().numpy().data).hexdigest()
    how = {"dtype": str(output.dtype), "dense": output.dense, "device": str(output.device)}
    return {"model": model, "text": text, "recipe": recipe, "output": how, "versions": machine}


def _measure(job: Job, journal: Journal, progress: Stages) -> None:
    """Has the maps measured that are chosen by what is measured, and puts them into the job's plan."""
    if not job.measures:
        return
    record = journal.get("measured")
    if record is None:
        assert job.tokens is not None
        how = (job.compute_dtype, job.output.device, progress, job.output.offload)
        maps, arrays = dump_plan(_measured_plan(job.store, job.recipe, job.tokens, *how))
        journal.put("measured", arrays, {"maps": maps})
        record = journal.get("measured")
    assert record is not None
    job.plan = load_plan(job.graph, job.recipe, record["maps"], journal.tensors("measured"))


def _learn(job: Job, journal: Journal, progress: Stages) -> dict[str, Any] | None:
    """Learns the rotations that the recipe asks for, puts them into the plan and says how it went."""
    if job.recipe.learn is None:
        return None
    started = time.perf_counter()
    setting = learning_setting(job.recipe, job.tokens, job.targets, job.quantizers, job.compute_dtype)
    result = learn(job.store, job.plan, job.recipe.learn, setting, progress, journal.path("learning"))
    job.plan = result.plan
    return {"losses": result.losses, "drift": result.drift, "seconds": round(time.perf_counter() - started, 3)}


def _prove_job(job: Job, progress: Stages) -> Proof:
    return _prove(job.store, job.plan, proof_sample(job), job.recipe, progress)


def _allocate(job: Job, journal: Journal, progress: Stages, warnings: list[str]) -> dict[str, Any] | None:
    """Gives layers their bits where the recipe asks for it, and says what was measured."""

    def choose() -> dict[str, Any]:
        said: list[str] = []
        return {"found": allocate(job, progress, said.append), "warnings": said}

    if job.recipe.weights.allocate is None:
        return None
    kept = journal.stage(ALLOCATION, choose)
    warnings += kept["warnings"]
    found: dict[str, Any] = kept["found"]
    give(job, found["bits"])
    return found


def _finish(job: Job, folder: Path, journal: Journal, progress: Stages) -> dict[str, Any] | None:
    """Gives a folder that is whole but for its manifest the last touch that the recipe asks for."""
    if job.recipe.finish is None:
        return None
    assert job.tokens is not None
    started, store, state = time.perf_counter(), open_model(folder), journal.path("finishing")
    assert isinstance(store, PackedStore)
    with evaluating(store.skeleton()):
        how = (job.recipe.finish, job.compute_dtype, job.recipe.seed)
        done = finish(store, job.store, job.tokens, *how, progress, state)
    return done | {"seconds": round(time.perf_counter() - started, 3)}


def _write_rotations(job: Job, folder: Path) -> None:
    rotations = rotations_of(job.plan, job.recipe.learn.sites) if job.recipe.learn is not None else {}
    if rotations:
        write_rotations(folder / FILE_NAME, rotations)


def proof_sample(job: Job) -> Tensor:
    """The tokens that the proof is made on, shape (samples, length)."""
    settings = job.recipe.proof
    if job.tokens is None:
        return torch.zeros(1, 1, dtype=torch.long)
    return job.tokens[: settings.nsamples, : settings.seqlen]


def _manifest(
    job: Job, model: str, proof: dict[str, Any], layers: list[dict[str, Any]], writer: Writer, warnings: list[str]
) -> dict[str, Any]:
    recipe, text = job.recipe, job.text
    original = job.store.read(job.graph.outer_params())
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
        "sites": [{"site": site.label, "map": dump(m, {}), "online": online} for site, m, online in job.plan.folded],
        "untied": list(job.plan.unties(original)),
        "proof": proof,
        "bits": writer.bits(),
        "layers": layers,
        "warnings": warnings,
        "versions": versions(),
    }
