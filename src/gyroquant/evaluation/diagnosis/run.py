"""A diagnosis: every measurement of a rounded model against its original, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.text import Text, TokenBatch
from gyroquant.errors import InputError
from gyroquant.evaluation.diagnosis.acceptance import LOSSLESS, acceptance
from gyroquant.evaluation.diagnosis.basis import residual_basis
from gyroquant.evaluation.diagnosis.conformal import PredictionSets
from gyroquant.evaluation.diagnosis.generations import Generation, compare_generations, passes, read_generations
from gyroquant.evaluation.diagnosis.greedy import choices, continuations, first_difference, summary
from gyroquant.evaluation.diagnosis.hidden_states import BlockStates, StateErrors
from gyroquant.evaluation.diagnosis.linearity import replaceability
from gyroquant.evaluation.diagnosis.options import ReportOptions
from gyroquant.evaluation.diagnosis.paired_run import PairedRun, TokenPredictions
from gyroquant.evaluation.diagnosis.smoothness import (
    EPSILON,
    candidates,
    input_gradients,
    measured_windows,
    smoothness,
)
from gyroquant.evaluation.diagnosis.verdict import verdict
from gyroquant.evaluation.perplexity import (
    WindowScores,
    check_vocabularies,
    counted_tokens,
    interval,
    text_windows,
)
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Progress


@dataclass(frozen=True)
class DiagnosisInputs:
    """What a diagnosis reads, checked before any work.

    - prompts: the prompts and what follows them in the text, shape (prompts, prompt_tokens + steps).
    - generations: those of the original, or None.
    """

    options: ReportOptions
    prompts: Tensor
    generations: Sequence[Generation] | None


def prepare_diagnosis(
    options: ReportOptions,
    store: WeightStore,
    against: WeightStore,
    text: Text,
    batch: TokenBatch,
    tokenizer: Any,
    add_bos: bool,
) -> DiagnosisInputs:
    """Checks everything that a diagnosis needs, and reads it.

    Raises InputError if the two models are not of one shape, if the text is too short for the coverage or the prompts,
    or if the generations cannot be used.
    """
    check_vocabularies(store, against)
    for name, of in (("blocks", lambda graph: len(graph.blocks)), ("hidden size", lambda graph: graph.hidden)):
        ours, theirs = (of(model.graph) for model in (store, against))
        if ours != theirs:
            raise InputError(
                f"{store.label} has {name} {ours} and {against.label} has {theirs}, so their blocks cannot be "
                "compared: give the original of this model with --against"
            )
    options.check_tokens(int(counted_tokens(batch.ids, batch.bos)[:, 1:].sum()))
    length, limit = options.prompt_tokens + options.steps, store.graph.max_positions
    if limit and length > limit:
        raise InputError(
            f"prompts of {options.prompt_tokens} tokens and {options.steps} steps do not fit a model of {limit} "
            "positions: ask for fewer"
        )
    prompts = text_windows(text, store, length, options.prompts, tokenizer, add_bos).ids
    if len(prompts) < options.prompts:
        raise InputError(
            f"the text is too short for a report: it has {len(prompts)} prompts of {options.prompt_tokens} tokens with "
            f"{options.steps} more, and {options.prompts} are asked for. Give a longer text, or --prompts "
            f"{len(prompts)}"
        )
    given = options.generations
    generations = None if given is None else read_generations(given, store, tokenizer, batch.bos)
    return DiagnosisInputs(options, prompts, generations)


class _Predictions:
    """Sums over the tokens of every window: acceptance and candidates. Also the prediction sets of both models."""

    def __init__(self, windows: int, tokens: int, coverage: float):
        self.accepted = torch.zeros(windows, dtype=torch.float64)
        self.candidates = dict.fromkeys(("rounded", "original"), 0)
        self.sets = {name: PredictionSets(tokens, coverage) for name in self.candidates}

    def see(self, seen: TokenPredictions) -> None:
        self.accepted[seen.window] += acceptance(seen.rounded, seen.original).double().sum().cpu()
        for name, probabilities in (("rounded", seen.rounded), ("original", seen.original)):
            self.candidates[name] += int(candidates(probabilities).sum())
            self.sets[name].see(probabilities, seen.wanted)

    def results(self, predicted: Tensor) -> dict[str, Any]:
        tokens = int(predicted.sum())
        return {
            "acceptance": {
                "rate": float(self.accepted.sum()) / tokens,
                "interval": list(interval(self.accepted, predicted)),
                "lossless_from": LOSSLESS,
            },
            "prediction_sets": {name: sets.summary() for name, sets in self.sets.items()},
            "candidates": {name: count / tokens for name, count in self.candidates.items()} | {"epsilon": EPSILON},
        }


def diagnose(
    store: WeightStore,
    against: WeightStore,
    batch: TokenBatch,
    inputs: DiagnosisInputs,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[WindowScores, dict[str, Any]]:
    """Measures a rounded model against its original on windows of a text.

    Returns the scores of `score_windows`, and the diagnosis: `verdict`, `acceptance`, `prediction_sets`, `candidates`,
    `smoothness`, `basis`, `embeddings`, `blocks`, `continuations`, and `generations` if there are any. All are numbers,
    strings, lists and dictionaries.
    """
    progress = progress or Progress()
    ids, options = batch.ids, inputs.options
    predicted = int(counted_tokens(ids, batch.bos)[:, 1:].sum())
    basis = residual_basis(store, against, device, progress)
    errors, predictions = StateErrors(len(store.graph.blocks)), _Predictions(len(ids), predicted, options.coverage)
    linear: list[dict[str, Any]] = []

    def see_block(states: BlockStates, first: bool) -> None:
        errors.see(states)
        if first:
            linear.append(replaceability(states))

    paired = PairedRun(store, against, basis, dtype, device, batch.bos)
    steps = len(paired.pieces(ids)) * len(store.graph.blocks)
    with progress.stage("diagnose", steps) as advance:
        scores = paired.run(ids, see_block, predictions.see, advance)
    start, rows = errors.rows()
    found = predictions.results(scores.predicted)
    blocks = [_block(row, fit) for row, fit in zip(rows, linear, strict=True)]
    result = {
        "verdict": verdict(found["acceptance"]["rate"], start, rows, basis.determined),
        **found,
        "coverage_asked": options.coverage,
        "smoothness": _smoothness(store, against, batch, device, progress),
        "basis": {
            "changed": basis.matrix is not None,
            "determined": basis.determined,
            "embedding_error": basis.error,
        },
        "embeddings": start,
        "blocks": blocks,
        **_steps(store, against, inputs, dtype, device, progress),
    }
    return scores, result


def _block(row: Mapping[str, Any], fit: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "linear_r2": {key: fit[key] for key in ("original", "rounded", "tokens")}}


def _smoothness(
    store: WeightStore, against: WeightStore, batch: TokenBatch, device: str, progress: Progress
) -> dict[str, Any]:
    ids = measured_windows(batch.ids)
    counted = counted_tokens(ids, batch.bos)
    with progress.stage("gradients", 4 * len(store.graph.blocks)) as advance:
        norms = [input_gradients(model, ids, counted, device, advance) for model in (store, against)]
    return smoothness(*norms)


def _steps(
    store: WeightStore,
    against: WeightStore,
    inputs: DiagnosisInputs,
    dtype: torch.dtype,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Where the two models first differ: in the original's continuations of prompts, and in given generations."""
    options, prompt = inputs.options, inputs.options.prompt_tokens
    with progress.stage("continue", options.steps + 1) as advance:
        texts = continuations(against, inputs.prompts, prompt, dtype, device, advance)
        ours = choices(store, texts, dtype, device)[:, prompt - 1 : -1].tolist()
        advance()
    firsts = [first_difference(a, b) for a, b in zip(texts[:, prompt:].tolist(), ours, strict=True)]
    result = {
        "continuations": summary(firsts, [options.steps] * len(firsts)) | {"prompt_tokens": prompt},
    }
    if inputs.generations is not None:
        pieces = passes(inputs.generations, (store, against), dtype)
        with progress.stage("generated", len(pieces)) as advance:
            result["generations"] = compare_generations(store, against, inputs.generations, dtype, device, advance)
    return result
