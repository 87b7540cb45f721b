"""The calibration windows of a job before any work: drawn, or stand-ins for those that a stage will make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.self_text import first_tokens, special_tokens
from gyroquant.calibration.text import Text, TokenBatch, bos_tokens, calibration_windows, token_stream
from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.stores.base import WeightStore
from gyroquant.recipes.calibration import Calibration


@dataclass(frozen=True)
class PlannedWindows:
    """The windows that are known before any work.

    - `tokens`: the calibration windows, shape (samples, length). If a stage makes them, any windows of that shape.
    - `bos`: the tokens at the start of each.
    - `candidates`: the windows to choose among, shape (windows, length); None if nothing is chosen.
    """

    tokens: Tensor
    bos: tuple[int, ...] = ()
    candidates: Tensor | None = None


def planned_windows(
    settings: Calibration, text: Text | TokenBatch | None, tokenizer: Any, store: WeightStore
) -> PlannedWindows:
    """The windows of a job as far as they are known. Raises InputError if they cannot be made."""
    vocabulary = store.text_config.vocab_size
    if settings.source == "self":
        return _to_be_written(settings, text, tokenizer, store)
    assert text is not None
    amount = (settings.nsamples, settings.seqlen, settings.seed)
    if settings.choose == "random":
        windows = calibration_windows(text, tokenizer, vocabulary, *amount, settings.add_bos)
        return PlannedWindows(windows.ids, windows.bos)
    if isinstance(text, TokenBatch):
        raise InputError(
            f"calibration.choose=coverage chooses windows of a text, and {text.name} are given as windows of tokens: "
            "give a text, or --set calibration.choose=random"
        )
    stream = token_stream(text, tokenizer, vocabulary, settings.add_bos)
    count = settings.candidates * settings.nsamples
    there = len(stream.windows(settings.seqlen).ids)
    if there < count:
        raise InputError(
            f"calibration.choose=coverage chooses among {settings.candidates} times {settings.nsamples} windows, and "
            f"{text.name} has only {there} of {settings.seqlen} tokens: give more text, or lower "
            "calibration.candidates, --nsamples or --seqlen"
        )
    pool = stream.sample(count, settings.seqlen, settings.seed)
    return PlannedWindows(pool.ids[: settings.nsamples], pool.bos, pool.ids)


def _to_be_written(
    settings: Calibration, text: Text | TokenBatch | None, tokenizer: Any, store: WeightStore
) -> PlannedWindows:
    if text is not None:
        raise InputError(
            f"with calibration.source=self the model writes the calibration text, and {text.name} is given: leave it "
            "out, or --set calibration.source=text"
        )
    if tokenizer is None:
        raise InputError(
            "calibration.source=self needs the model's tokenizer, which says how texts begin and end: put it into the "
            "model's folder, or give a text with --set calibration.source=text"
        )
    if not getattr(store.skeleton(), "can_generate", lambda: False)():
        raise UnsupportedModelError(
            f"transformers cannot generate text with {store.label}: give a text with --set calibration.source=text"
        )
    bos = bos_tokens(tokenizer) if settings.add_bos else ()
    if settings.seqlen <= len(bos):
        raise InputError(f"calibration.seqlen {settings.seqlen} has no room for text after {len(bos)} special tokens")
    first, _ = first_tokens(store.text_config.vocab_size, special_tokens(tokenizer), settings.nsamples, settings.seed)
    start = torch.tensor(bos, dtype=torch.long).expand(settings.nsamples, -1)
    tokens = first[:, None].expand(-1, settings.seqlen - len(bos))
    return PlannedWindows(torch.cat([start, tokens], 1), bos)
