"""Folds a recipe's maps into a model in memory. Nothing is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gyroquant.calibration.text import Text, TokenBatch, calibration_windows, load_text, token_stream
from gyroquant.errors import InputError
from gyroquant.finetuning import learn
from gyroquant.formats.native.hf_quantizer import keep_online
from gyroquant.models.execution.runner import evaluating
from gyroquant.models.folding.in_memory import write_folded
from gyroquant.models.folding.prove import Proof
from gyroquant.models.stores.adapters import check_plain
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.folds import plan_folds
from gyroquant.pipeline.planning import learning_setting, plan_all
from gyroquant.pipeline.stages.compare import compare_store
from gyroquant.pipeline.stages.measure import measured_plan
from gyroquant.pipeline.stages.prove import prove_plan
from gyroquant.pipeline.validation import check_seqlen
from gyroquant.recipes.schema import Recipe, load_recipe
from gyroquant.system.deprecation import renamed
from gyroquant.system.progress import Progress

Calibration = str | Path | Sequence[str | Mapping[str, Any]] | Tensor


@renamed(calibration="text")
def transform(
    model: PreTrainedModel,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    text: Calibration | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Proof:
    """Folds a recipe's maps into a model in memory, after a proof on tokens that the model stays the same function.

    Maps are measured and learned as in the recipe. Nothing is rounded: weights, activations and cache stay exact.
    Weights keep their dtype; the proof is made in fp32.

    - `text`: a text, with `tokenizer`, or token ids of shape (samples, length), which are used unchanged. Default None:
      the proof is made on random tokens.

    A recipe that measures or learns uses `calibration.nsamples` windows of `calibration.seqlen` tokens; given ids must
    have that length. The proof uses `proof.nsamples` windows of `proof.seqlen` tokens; of given ids, the first.

    Raises InputError if there are fewer tokens, or if the model has fewer positions. Raises UnsupportedModelError (of
    which ProofError is a subclass) if the fold cannot be exact. The model does not change in these cases.
    """
    recipe, progress = load_recipe(recipe), progress or Progress()
    _check_windows(recipe)
    check_plain(model)
    store = ModuleStore(model)
    plan = plan_folds(store.graph, recipe)
    compare_store(store, progress)
    if recipe.learn is not None:  # only learning needs the layers to round
        plan, targets, quantizers = plan_all(store.graph, recipe)
    source = _source(text, tokenizer)
    proof_tokens = _proof_tokens(model, recipe, source, tokenizer)
    with evaluating(model):
        if recipe.measures:
            tokens = _windows_in_memory(model, recipe, source, tokenizer)
            plan = measured_plan(store, recipe, tokens, torch.float32, model.device, progress)
        if recipe.learn is not None:
            windows = None if source is None else _windows_in_memory(model, recipe, source, tokenizer)
            setting = learning_setting(recipe, plan, windows, targets, quantizers, torch.float32)
            plan = learn(store, plan, recipe.learn, setting, progress).plan
        proof = prove_plan(store, plan, proof_tokens, recipe, progress)
    write_folded(model, plan)
    keep_online(model, plan.online)
    return proof


def _check_windows(recipe: Recipe) -> None:
    """Refuses windows that are not drawn by chance, because this function makes none."""
    for key, usual in (("source", "text"), ("choose", "random")):
        if getattr(recipe.calibration, key) != usual:
            raise InputError(
                f"transform(...) draws windows of a text by chance, or takes the token ids that it is given: set "
                f"calibration.{key} to {usual}, or call quantize"
            )


def _proof_tokens(model: Any, recipe: Recipe, source: Text | TokenBatch | None, tokenizer: Any) -> Tensor:
    """The tokens of the proof in memory, exactly as many as the recipe's `proof` section states."""
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
    """The calibration windows of a recipe, for a model in memory."""
    settings = recipe.calibration
    if source is None:
        raise InputError("this recipe measures the model on text: call transform(..., text=..., tokenizer=...)")
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
        raise InputError("a calibration text needs its tokenizer: call transform(..., tokenizer=...)")
    return load_text(calibration)
