"""Perplexity, and divergence from another model, over windows of a text; streamed, so that no whole model is ever
held.
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
from gyroquant.models.online import attached
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.store import WeightStore
from gyroquant.progress import Advance, Stages

_CHUNK_BYTES = 1 << 28  # hidden states held at once
_RESAMPLES = 2000

PRESETS = {"standard": (2048, None), "bbt": (1024, 8)}
"""Window length and number of windows: the whole text in windows of 2048, or the first 8,192 tokens in windows of
1,024.
"""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What models can be measured in."""


def cut(preset: str, window: int | None, most: int | None) -> tuple[int, int | None]:
    """The window length and number of windows (None: all) of a preset, where `window` and `most` say nothing else.

    Raises InputError for a preset that there is not.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}; presets are {', '.join(PRESETS)}")
    length, count = PRESETS[preset]
    if window is not None:
        length, count = window, None
    return length, count if most is None else most


def text_windows(
    text: Text, store: WeightStore, length: int, count: int | None, tokenizer: Any = None, add_bos: bool = True
) -> TokenBatch:
    """The first `count` windows (None: all) of a text, shape (windows, length), for a model; fewer where the text has
    fewer. With `add_bos` each begins with the special tokens that the tokenizer puts in front of a text.

    Raises InputError for a window that does not fit the model, for a text that has none, and for a count below 1.
    """
    if count is not None and count < 1:
        raise InputError(f"--windows is {count}, and has to be at least 1")
    limit = getattr(store.text_config, "max_position_embeddings", None)
    if length < 2 or (limit and length > limit):
        raise InputError(
            f"a window of {length} tokens does not fit a model of {limit} positions (and needs at least 2)"
        )
    return token_stream(text, tokenizer or store.tokenizer(), store.text_config.vocab_size, add_bos).windows(
        length, count
    )


@dataclass(frozen=True)
class WindowScores:
    """Sums over the predicted tokens of each window, shape (windows,), fp64; `predicted` is how many there are in each,
    shape (windows,), int64.

    `kl` (in nats, from the other model to this one) and `agree` (equal most likely tokens) are None without another
    model.
    """

    loss: Tensor
    predicted: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None


def _hidden(
    store: WeightStore, ids: Tensor, dtype: torch.dtype, device: str, advance: Advance, known: Tensor | None = None
) -> tuple[Stream, Any]:
    """A stream that has passed through all blocks, or is told where that leads, and the parameters for its head."""
    graph = store.graph
    outer = store.read(graph.outer_params())
    runner = BlockRunner(store.skeleton(), graph)
    stream = Stream(runner, ids, outer, dtype, device=device)
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
    progress: Stages | None = None,
) -> Tensor:
    """What leaves the last block for `input_ids`, shape (windows, length): (windows, length, hidden), in `dtype`."""
    with evaluating(store.skeleton()), (progress or Stages()).stage("evaluate", len(store.graph.blocks)) as advance:
        stream, _ = _hidden(store, input_ids, dtype, device, advance)
    assert stream.hidden is not None
    return stream.hidden


def _pairs(stores: list[WeightStore], streams: list[tuple[Stream, Any]]) -> Iterator[tuple[int, int, list[Tensor]]]:
    with ExitStack() as attachments:
        for store in stores:
            attachments.enter_context(attached(store.skeleton(), store.graph.around_blocks(store.online)))
        for pieces in zip(*(stream.logits(outer) for stream, outer in streams), strict=True):
            yield pieces[0][0], pieces[0][1], [logits.float().log_softmax(-1) for _, _, logits in pieces]


@torch.no_grad()
def score_windows(
    store: WeightStore,
    input_ids: Tensor,
    against: WeightStore | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Stages | None = None,
    known: Tensor | None = None,
    bos: Sequence[int] = (),
) -> WindowScores:
    """Scores `input_ids`, shape (windows, length): all tokens but a window's first are predicted from those before.

    The tokens `bos` begin texts, which nothing predicts: they are read, and no prediction of them counts. `known` is
    what `last_hidden` gave for the model `against`, on the same tokens and in the same dtype.
    """
    stores = [store] if against is None else [store, against]
    if against is not None and against.text_config.vocab_size != store.text_config.vocab_size:
        raise InputError(f"{against.label} has another vocabulary than {store.label}: they cannot be compared")
    width = max(one.graph.hidden for one in stores) * dtype.itemsize * input_ids.shape[1]
    chunk = max(1, _CHUNK_BYTES // width)
    totals = torch.zeros(3, len(input_ids), dtype=torch.float64)
    counted = ~torch.isin(input_ids, torch.tensor(bos, dtype=input_ids.dtype, device=input_ids.device))
    predicted = counted[:, 1:].sum(1).cpu()
    if not bool(predicted.all()):
        raise InputError("a window holds no token that is predicted, only such that begin a text: take longer windows")
    pieces = range(0, len(input_ids), chunk)
    steps = sum(len(one.graph.blocks) for one in stores if one is store or known is None) * len(pieces)
    with (progress or Stages()).stage("evaluate", steps) as advance:
        for first in pieces:
            ids = input_ids[first : first + chunk]
            streams = []
            for one in stores:
                with evaluating(one.skeleton()):
                    there = known[first : first + chunk] if one is against and known is not None else None
                    streams.append(_hidden(one, ids, dtype, device, advance, there))
            for number, start, logs in _pairs(stores, streams):
                totals[:, first + number] += _sums(ids[number], start, logs, counted[first + number])
    return WindowScores(totals[0], predicted, *(() if against is None else (totals[1], totals[2])))


def _sums(ids: Tensor, start: int, logs: list[Tensor], counted: Tensor) -> Tensor:
    """Loss, divergence and agreement of one piece of a window, summed over its positions that predict a token which is
    `counted`, shape (length,).
    """
    where = slice(start + 1, start + 1 + len(logs[0]))
    wanted, keep = ids[where].to(logs[0].device), counted[where].to(logs[0].device)
    logs = [one[: len(wanted)] for one in logs]
    if not bool(keep.all()):
        wanted, logs = wanted[keep], [one[keep] for one in logs]
    ours = logs[0]
    loss = -ours.gather(1, wanted[:, None]).sum()
    if len(logs) == 1:
        return torch.stack([loss, loss.new_zeros(()), loss.new_zeros(())]).double().cpu()
    theirs = logs[1]
    kl = (theirs.exp() * (theirs - ours)).sum()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return torch.stack([loss, kl, agree.to(loss)]).double().cpu()


def interval(values: Tensor, weight: Tensor | int, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval over windows for the sum of `values` over that of `weight`, both of shape
    (windows,); a number is the weight of every window.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(values), (_RESAMPLES, len(values)), generator=generator)
    means = values[picks].mean(1) / (weight[picks].double().mean(1) if isinstance(weight, Tensor) else weight)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
    return float(low), float(high)


def summary(scores: WindowScores) -> dict[str, Any]:
    """Perplexity, KL divergence and top-1 agreement with 95 % bootstrap intervals over windows (None where not
    measured).
    """

    def mean(values: Tensor) -> float:
        return float(values.mean()) / float(scores.predicted.double().mean())

    def exponential(value: float) -> float:
        return math.exp(min(value, 700.0))  # a hopeless model still gets a number that JSON can hold

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
