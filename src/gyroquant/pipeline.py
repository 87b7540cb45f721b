"""The one place that knows the order of the stations: text, batches, choose, fold, prove, round, pack, save."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gyroquant.allocation import allocate
from gyroquant.blockwise import observed_in_turn, round_block
from gyroquant.calibration.measure import Want, measure
from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.calibration.text import load_text, sample, tokenize
from gyroquant.elsewhere import round_elsewhere
from gyroquant.environment import peak_memory_bytes, steady_memory, versions
from gyroquant.errors import InputError
from gyroquant.export.folder import OutputFolder
from gyroquant.export.hf import keep_online
from gyroquant.export.memory import write_folded
from gyroquant.export.writer import DenseWriter, PackedWriter
from gyroquant.grids import QuantizedWeight
from gyroquant.job import Job, learning_setting, plan_all
from gyroquant.learning import finish, learn
from gyroquant.learning.rotations import FILE_NAME, rotations_of, write_rotations
from gyroquant.maps import dump
from gyroquant.models.fold import FoldPlan, fold
from gyroquant.models.graph import LinearOp
from gyroquant.models.online import attached
from gyroquant.models.packed import PackedStore
from gyroquant.models.prove import Proof, folded_outer, prove
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.source import open_model
from gyroquant.models.store import ModuleStore, WeightStore
from gyroquant.planning import needs_measuring, plan_folds
from gyroquant.progress import Stages
from gyroquant.recipe import Recipe, load_recipe
from gyroquant.rounding.judge import LayerReport, judge_part
from gyroquant.rounding.stage import Part, round_part

Calibration = str | Path | Sequence[str] | Tensor


def _trivial_proof(plan: FoldPlan, threshold: float) -> Proof:
    """Nothing is folded, so the folded model is the original, bit for bit."""
    return Proof(0.0, 0, 0.0, threshold, 0, (0.0,) * len(plan.graph.blocks))


def _prove(store: WeightStore, plan: FoldPlan, tokens: Tensor, recipe: Recipe, progress: Stages) -> Proof:
    if not plan.edits and not plan.online:
        return _trivial_proof(plan, recipe.proof.threshold)
    runner = BlockRunner(store.skeleton(), plan.graph)
    with progress.stage("prove", len(plan.graph.blocks)) as advance:
        return prove(store, plan, runner, tokens, recipe.proof.threshold, lambda done, total: advance())


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

    `calibration` is a text, with `tokenizer`, or token ids of shape (batch, length); without it the proof is made on
    random tokens. Raises UnsupportedModelError (of which ProofError is one) with the model untouched when it cannot be
    exact. Weights keep their dtype; the proof is made in fp32.
    """
    recipe, progress = load_recipe(recipe), progress or Stages()
    store = ModuleStore(model)
    plan = plan_folds(store.graph, recipe)
    if recipe.learn is not None:  # only then does it matter what would be rounded
        plan, targets, quantizers = plan_all(store.graph, recipe)
    with evaluating(model):
        if needs_measuring(recipe):
            tokens = _tokens_in_memory(model, recipe, calibration, tokenizer)
            plan = _measured_plan(store, recipe, tokens, torch.float32, model.device, progress)
        if recipe.learn is not None:
            text = None if calibration is None else _tokens_in_memory(model, recipe, calibration, tokenizer)
            setting = learning_setting(recipe, text, targets, quantizers, torch.float32)
            plan = learn(store, plan, recipe.learn, setting, progress).plan
        proof = _prove(store, plan, _proof_tokens(model, recipe, calibration, tokenizer), recipe, progress)
    write_folded(model, plan)
    keep_online(model, plan.online)
    return proof


def _proof_tokens(model: Any, recipe: Recipe, calibration: Calibration | None, tokenizer: Any) -> Tensor:
    settings = recipe.proof
    if calibration is not None:
        return _tokens_in_memory(model, recipe, calibration, tokenizer, settings.nsamples, settings.seqlen)
    limit = int(getattr(model.config, "max_position_embeddings", None) or settings.seqlen)
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (settings.nsamples, min(settings.seqlen, limit))
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)


def _tokens_in_memory(
    model: Any,
    recipe: Recipe,
    calibration: Calibration | None,
    tokenizer: Any,
    count: int | None = None,
    length: int | None = None,
) -> Tensor:
    """Windows of a calibration text for a model in memory: as many and as long as the recipe says, or as asked for."""
    settings = recipe.calibration
    count, length = count or settings.nsamples, length or settings.seqlen
    length = min(length, int(getattr(model.config, "max_position_embeddings", None) or length))
    if isinstance(calibration, Tensor):
        return calibration[:count, :length].to(model.device)
    if calibration is None:
        raise InputError("this recipe measures the model on text: transform(..., calibration=..., tokenizer=...)")
    if tokenizer is None:
        raise InputError("a calibration text needs its tokenizer: transform(..., tokenizer=...)")
    text = load_text(calibration)
    ids = tokenize(text, tokenizer, model.config.vocab_size)
    return sample(ids, count, length, settings.seed, text.name).to(model.device)


def run(job: Job, progress: Stages | None = None) -> dict[str, Any]:
    """Proves, rounds and saves; returns the manifest that it also writes as `gyroquant.json`.

    The destination appears only when all of it is there. Raises ProofError before anything is written when the fold is
    not exact.
    """
    progress = progress or Stages()
    started = time.perf_counter()
    steady_memory()
    warnings: list[str] = []
    with evaluating(job.store.skeleton()):
        if job.measures:
            assert job.tokens is not None
            tokens, dtype = job.tokens, job.compute_dtype
            job.plan = _measured_plan(
                job.store, job.recipe, tokens, dtype, job.output.device, progress, job.output.offload
            )
        learned = _learn(job, progress)
        proof = _prove(job.store, job.plan, proof_sample(job), job.recipe, progress)
        allocation = allocate(job, progress, warnings.append)
        job.rounded = round_elsewhere(job, progress)
        with OutputFolder(job.output.folder, job.output.overwrite) as folder:
            writer = (DenseWriter if job.output.dense else PackedWriter)(folder, job.store, job.output.dtype)
            layers = _round(job, writer, progress, warnings)
            writer.online([*job.plan.online, *job.quantizers])
            folder.merge()
            manifest = _manifest(job, proof, layers, writer, warnings)
            writer.finish(job.tokenizer, manifest["untied"])
            manifest["learned"], manifest["allocation"] = learned, allocation
            manifest["finished"] = _finish(job, folder.partial, progress)
            manifest["seconds"] = round(time.perf_counter() - started, 3)
            manifest["peak_memory_bytes"] = peak_memory_bytes()
            rotations = rotations_of(job.plan, job.recipe.learn.sites) if job.recipe.learn is not None else {}
            if rotations:
                write_rotations(folder.partial / FILE_NAME, rotations)
            folder.json("gyroquant.json", manifest)
            folder.commit()
    _checkpoint(job).unlink(missing_ok=True)
    for text in warnings:
        progress.warn(text)
    return manifest


def _checkpoint(job: Job) -> Path:
    """Where the state of learned rotations is kept until the result is there."""
    return job.output.folder.with_name(f".{job.output.folder.name}.rotations.safetensors")


def _learn(job: Job, progress: Stages) -> dict[str, Any] | None:
    """Learns the rotations that the recipe asks for, puts them into the plan and says how it went."""
    if job.recipe.learn is None:
        return None
    started = time.perf_counter()
    setting = learning_setting(job.recipe, job.tokens, job.targets, job.quantizers, job.compute_dtype)
    result = learn(job.store, job.plan, job.recipe.learn, setting, progress, _checkpoint(job))
    job.plan = result.plan
    return {"losses": result.losses, "drift": result.drift, "seconds": round(time.perf_counter() - started, 3)}


def _finish(job: Job, folder: Path, progress: Stages) -> dict[str, Any] | None:
    """Gives a folder that is whole but for its manifest the last touch that the recipe asks for."""
    if job.recipe.finish is None:
        return None
    assert job.tokens is not None
    started, store = time.perf_counter(), open_model(folder)
    assert isinstance(store, PackedStore)
    with evaluating(store.skeleton()):
        done = finish(store, job.store, job.tokens, job.recipe.finish, job.compute_dtype, job.recipe.seed, progress)
    return done | {"seconds": round(time.perf_counter() - started, 3)}


def proof_sample(job: Job) -> Tensor:
    """The tokens that the proof is made on, shape (samples, length)."""
    settings = job.recipe.proof
    if job.tokens is None:
        return torch.zeros(1, 1, dtype=torch.long)
    return job.tokens[: settings.nsamples, : settings.seqlen]


@torch.no_grad()
def _round(job: Job, writer: Any, progress: Stages, warnings: list[str]) -> list[LayerReport]:
    """Folds, observes, rounds and writes one block after another, each calibrated on the rounded ones before it."""
    graph, layers = job.graph, list[LayerReport]()
    outer = folded_outer(job.plan, job.store.read(graph.outer_params()))
    runner = BlockRunner(job.store.skeleton(), graph)
    stream = None
    if job.needs_stream:
        assert job.tokens is not None
        stream = job.stream(runner, job.tokens, outer, job.output.offload)
    head = {name: op for name, op in job.targets.items() if op in graph.outer.linears}
    if not head:
        writer.add(_saved(outer, job.output.dtype))
        del outer
    tune = job.recipe.weights.tune
    total = len(graph.blocks)
    if stream:
        turns = sum(len(observed_in_turn(job, i)) for i in range(total))
        runs = 1 + int(job.centers_keys) + int(job.recipe.weights.correct_bias)
        total = stream.steps * (turns + total * runs) + total * (tune.iters if tune else 0)
    with progress.stage("round", total) as advance:
        for i, group in enumerate(graph.blocks):
            tensors = fold(job.plan, job.store.read(graph.block_params(i)))
            rounded, reports, tensors = round_block(job, i, group, tensors, stream, advance, warnings, tune)
            layers += reports
            writer.add(_saved(tensors, job.output.dtype, rounded), _by_op(job, rounded))
            if stream:
                with attached(runner.model, job.running_in(i)):
                    stream.run(i, tensors, progress=advance)
            else:
                advance()
    if head:
        layers += _round_head(job, outer, stream, writer, warnings)
    return layers


def _by_op(job: Job, rounded: Mapping[str, QuantizedWeight]) -> list[tuple[LinearOp, QuantizedWeight]]:
    return [(job.targets[name], weight) for name, weight in rounded.items()]


def _round_head(
    job: Job, outer: dict[str, Tensor], stream: Stream | None, writer: Any, warnings: list[str]
) -> list[LayerReport]:
    """Rounds the head, which reads what leaves the last norm."""
    model, group = job.store.skeleton(), job.graph.outer
    observed: dict[Any, Any] = {}
    if stream:
        online = job.running_around()
        with attached(model, online), observing(model, group, [], stream.observer) as observed:
            stream.observe_head(outer)
    part = Part(group, job.targets, outer, observed, [])
    rounded = round_part(part, job.rounding(warnings.append))
    reports = judge_part(part, rounded)
    writer.add(_saved(outer, job.output.dtype, rounded), _by_op(job, rounded))
    return reports


def _saved(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, rounded: Mapping[str, QuantizedWeight] | None = None
) -> dict[str, Tensor]:
    """The parameters that are stored as they are, in the dtype of the output."""
    saved = {name: tensor.to(dtype) for name, tensor in tensors.items() if name not in (rounded or {})}
    for name, tensor in saved.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} is too large for {dtype}; choose another with --save-dtype bfloat16 or float32")
    return saved


def _manifest(job: Job, proof: Proof, layers: list[LayerReport], writer: Any, warnings: list[str]) -> dict[str, Any]:
    recipe, text = job.recipe, job.text
    original = job.store.read(job.graph.outer_params())
    return {
        "gyroquant": versions()["gyroquant"],
        "model": job.store.label,
        "model_type": job.store.config.model_type,
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "text": None if text is None else {"name": text.name, "sha256": text.sha256},
        "calibration_dtype": str(job.compute_dtype).removeprefix("torch.") if job.needs_stream else None,
        "sites": [{"site": site.label, "map": dump(m, {}), "online": online} for site, m, online in job.plan.folded],
        "untied": list(job.plan.unties(original)),
        "proof": proof.to_dict(),
        "bits": writer.bits(),
        "layers": [asdict(layer) for layer in layers],
        "warnings": warnings,
        "versions": versions(),
    }
