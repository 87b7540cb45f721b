"""Perplexity, and divergence from another model, over windows of a text.

Blocks are streamed, so memory never holds a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.calibration.text import Text, TokenBatch, token_stream
from gyroquant.errors import InputError
from gyroquant.evaluation.divergence import agreeing, summed_divergence
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance, Progress

_CHUNK_BYTES = 1 << 28  # this many bytes of hidden states are held at once
RESAMPLES = 2000
"""How often a bootstrap draws windows."""

PRESETS = {"standard": (2048, None), "bbt": (1024, 8)}
"""Window length in tokens and number of windows. `standard`: the whole text in windows of 2,048. `bbt`: the first 8
windows of 1,024.
"""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that models can be measured in."""


def cut(preset: str, window: int | None, most: int | None) -> tuple[int, int | None]:
    """The window length and the number of windows (None: all) of a preset. `window` and `most` override them.

    Raises InputError for an unknown preset.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}: use {', '.join(PRESETS)}")
    length, count = PRESETS[preset]
    if window is not None:
        length, count = window, None
    return length, count if most is None else most


def text_windows(
    text: Text, store: WeightStore, length: int, count: int | None, tokenizer: Any = None, add_bos: bool = True
) -> TokenBatch:
    """The first `count` windows (None: all) of a text for a model, shape (windows, length); fewer if it has fewer.

    With `add_bos`, each window begins with the tokenizer's BOS tokens. Raises InputError for a window that does not fit
    the model, for a text shorter than one window, and for a count below 1.
    """
    if count is not None and count < 1:
        raise InputError(f"--windows is {count}, and has to be at least 1")
    limit = store.graph.max_positions
    if length < 2 or (limit and length > limit):
        raise InputError(
            f"a window of {length} tokens does not fit a model of {limit} positions: use 2 to {limit} tokens"
            if limit
            else f"a window of {length} tokens is too short: use 2 or more"
        )
    return token_stream(text, tokenizer or store.tokenizer(), store.text_config.vocab_size, add_bos).windows(
        length, count
    )


@dataclass(frozen=True)
class WindowScores:
    """Sums over the predicted tokens of each window, shape (windows,), fp64.

    - loss: negative log-likelihood in nats.
    - predicted: how many predicted tokens each window has, int64.
    - kl: KL divergence from the other model to this one, in nats. None without another model.
    - agree: how many tokens are the most likely ones in both models. None without another model.
    """

    loss: Tensor
    predicted: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None


def after_blocks(
    store: WeightStore, ids: Tensor, dtype: torch.dtype, device: str, advance: Advance, known: Tensor | None = None
) -> tuple[Stream, Any]:
    """A stream after all blocks, and the parameters around the blocks. `known` replaces the run."""
    graph = store.graph
    outer = store.read(graph.outer_params())
    stream = Stream(BlockRunner.of(store, store.online), ids, outer, dtype, device=device)
    stream.free_outer()
    if known is None:
        stream.run_all(store, advance)
    else:
        stream.hidden = known
    return stream, outer


@torch.no_grad()
def last_hidden(
    store: WeightStore,
    input_ids: Tensor,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """The output of the last block for `input_ids`, shape (windows, length): (windows, length, hidden), in `dtype`."""
    with evaluating(store.skeleton()), (progress or Progress()).stage("evaluate", len(store.graph.blocks)) as advance:
        stream, _ = after_blocks(store, input_ids, dtype, device, advance)
    assert stream.hidden is not None
    return stream.hidden


def paired_logs(
    stores: list[WeightStore], streams: list[tuple[Stream, Any]]
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Log-probabilities of one or two models in fp32, in pieces: (window, first position, of each model).

    Those of a model have shape (positions, vocabulary).
    """
    with ExitStack() as attachments:
        for store in stores:
            attachments.enter_context(attached(store.skeleton(), store.graph.around_blocks(store.online)))
        for pieces in zip(*(stream.logits(outer) for stream, outer in streams), strict=True):
            yield pieces[0][0], pieces[0][1], [logits.float().log_softmax(-1) for _, _, logits in pieces]


def check_vocabularies(store: WeightStore, against: WeightStore) -> None:
    """Raises InputError if two models have different vocabularies."""
    if against.text_config.vocab_size != store.text_config.vocab_size:
        raise InputError(
            f"{against.label} and {store.label} have different vocabularies and cannot be compared: give the original "
            "of this model"
        )


def windows_at_once(stores: Sequence[WeightStore], length: int, dtype: torch.dtype) -> int:
    """How many windows of `length` tokens run through the models at once. Their hidden states are in memory."""
    return max(1, _CHUNK_BYTES // (max(model.graph.hidden for model in stores) * dtype.itemsize * length))


def counted_tokens(input_ids: Tensor, bos: Sequence[int]) -> Tensor:
    """The tokens whose prediction counts: those that are not BOS. bool, shape (windows, length).

    Raises InputError if a window has no such token after its first.
    """
    counted = ~torch.isin(input_ids, torch.tensor(bos, dtype=input_ids.dtype, device=input_ids.device))
    if not bool(counted[:, 1:].any(1).all()):
        raise InputError("a window has only BOS tokens, none of which counts: take longer windows")
    return counted


@torch.no_grad()
def score_windows(
    store: WeightStore,
    input_ids: Tensor,
    against: WeightStore | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
    known: Tensor | None = None,
    bos: Sequence[int] = (),
) -> WindowScores:
    """Scores `input_ids`, shape (windows, length). Each token of a window but the first is predicted from those before.

    The tokens `bos` are read, but no prediction of them counts. `known` is the result of `last_hidden` for the model
    `against`, on the same tokens and in the same dtype. Raises InputError if the vocabularies differ, or if a window
    has no token that counts.
    """
    stores = [store] if against is None else [store, against]
    if against is not None:
        check_vocabularies(store, against)
    chunk = windows_at_once(stores, input_ids.shape[1], dtype)
    totals = torch.zeros(3, len(input_ids), dtype=torch.float64)
    counted = counted_tokens(input_ids, bos)
    predicted = counted[:, 1:].sum(1).cpu()
    pieces = range(0, len(input_ids), chunk)
    steps = sum(len(model.graph.blocks) for model in stores if model is store or known is None) * len(pieces)
    with (progress or Progress()).stage("evaluate", steps) as advance:
        for first in pieces:
            ids = input_ids[first : first + chunk]
            streams = []
            for model in stores:
                with evaluating(model.skeleton()):
                    states = known[first : first + chunk] if model is against and known is not None else None
                    streams.append(after_blocks(model, ids, dtype, device, advance, states))
            for number, start, logs in paired_logs(stores, streams):
                totals[:, first + number] += window_sums(ids[number], start, logs, counted[first + number])
    return WindowScores(totals[0], predicted, *(() if against is None else (totals[1], totals[2])))


def window_sums(ids: Tensor, start: int, logs: list[Tensor], counted: Tensor) -> Tensor:
    """Loss, divergence and agreement of one piece of a window, summed over positions whose next token is `counted`.

    `counted` has shape (length,).
    """
    where = slice(start + 1, start + 1 + len(logs[0]))
    wanted, keep = ids[where].to(logs[0].device), counted[where].to(logs[0].device)
    logs = [predicted[: len(wanted)] for predicted in logs]
    if not bool(keep.all()):
        wanted, logs = wanted[keep], [predicted[keep] for predicted in logs]
    ours = logs[0]
    loss = -ours.gather(1, wanted[:, None]).sum()
    if len(logs) == 1:
        return torch.stack([loss, loss.new_zeros(()), loss.new_zeros(())]).double().cpu()
    theirs = logs[1]
    agree = agreeing(theirs, ours).to(loss)
    return torch.stack([loss, summed_divergence(theirs, ours), agree]).double().cpu()


def interval(values: Tensor, weight: Tensor | int, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval, over windows, of the sum of `values` divided by the sum of `weight`.

    Both have shape (windows,). A number is the weight of every window.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[picks].mean(1) / (weight[picks].double().mean(1) if isinstance(weight, Tensor) else weight)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
    return float(low), float(high)


def summary(scores: WindowScores) -> dict[str, Any]:
    """Perplexity, KL divergence and top-1 agreement, with 95 % bootstrap intervals over windows.

    What was not measured is None.
    """

    def mean(values: Tensor) -> float:
        return float(values.mean()) / float(scores.predicted.double().mean())

    def exponential(value: float) -> float:
        return math.exp(min(value, 700.0))  # JSON cannot hold infinity

    low, high = interval(scores.loss, scores.predicted)
    result: dict[str, Any] = {
        "perplexity": exponential(mean(scores.loss)),
        "perplexity_interval": [exponential(low), exponential(high)],
        "loss": mean(scores.loss),
        "predicted": int(scores.predicted.sum()),
        "kl": None,
        "kl_interval": None,
        "top1_agreement": None,
        "top1_interval": None,
    }
    if scores.kl is not None and scores.agree is not None:
        result |= {
            "kl": mean(scores.kl),
            "kl_interval": list(interval(scores.kl, scores.predicted)),
            "top1_agreement": mean(scores.agree),
            "top1_interval": list(interval(scores.agree, scores.predicted)),
        }
    return result
