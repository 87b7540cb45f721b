"""Calibration text that the model writes itself (LLM-QAT, arXiv 2305.17888).

A window begins with a token of the vocabulary. The next ones are the most probable, up to 3, 4 or 5 tokens in turn, and
the others are drawn from the model's distribution, as the original does it with the defaults of transformers:
temperature 1, and only the 50 most probable tokens. Three things differ from its code. The first tokens are a random
permutation of the vocabulary and not its beginning, because a few windows do not reach far in it. Special tokens are
not written, so no text ends before its window is full. And windows begin with the tokenizer's BOS tokens, as those of
other texts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gyroquant.errors import InputError
from gyroquant.system.progress import Advance

AT_ONCE = 16  # windows that are written at once
_CERTAIN = (3, 4, 5)  # tokens that are not drawn, the first one included, for windows in turn
_TOP = 50
_SEEDS = 1 << 31


def first_tokens(vocabulary: int, special: Iterable[int], nsamples: int, seed: int) -> tuple[Tensor, list[int]]:
    """The first token of each window, shape (nsamples,), and the seed of each window.

    Every token that is not `special` begins a window before one begins another. Raises InputError if all are special.
    """
    generator = torch.Generator().manual_seed(seed)
    left_out = set(special)
    usable = torch.tensor([token for token in range(vocabulary) if token not in left_out])
    if not len(usable):
        raise InputError(
            "all tokens of the tokenizer are special, so none can begin a text: set calibration.source=text"
        )
    rounds = [usable[torch.randperm(len(usable), generator=generator)] for _ in range(-(-nsamples // len(usable)))]
    return torch.cat(rounds)[:nsamples], torch.randint(0, _SEEDS, (nsamples,), generator=generator).tolist()


def special_tokens(tokenizer: Any) -> set[int]:
    """The special tokens of a tokenizer."""
    return {int(token) for token in getattr(tokenizer, "all_special_ids", ()) or ()}


def written_windows(
    model: Any,
    first: Tensor,
    seeds: Sequence[int],
    length: int,
    number: int = 0,
    bos: Sequence[int] = (),
    never: Iterable[int] = (),
    progress: Advance = lambda: None,
) -> Tensor:
    """Windows that a model of transformers writes, shape (windows, length), for their first tokens, shape (windows,).

    - `seeds`: the seed of each window, so that it does not depend on the others.
    - `number`: the number of the first of these windows, which says how many of its tokens are certain.
    - `bos`: tokens in front of every window, which are part of its length.
    - `never`: tokens that are not written, such as special ones.

    Progress is reported once a token.
    """
    start = torch.cat([torch.tensor(bos, dtype=torch.long).expand(len(first), -1), first[:, None]], 1)[:, :length]
    if start.shape[1] == length:
        return start
    certain = [len(bos) + _CERTAIN[(number + i) % len(_CERTAIN)] for i in range(len(first))]
    draw = _Draw(certain, seeds, sorted(never), progress)
    settings = GenerationConfig(
        do_sample=False, max_length=length, eos_token_id=None, pad_token_id=0, bos_token_id=None, use_cache=True
    )
    model.generation_config = settings
    start = start.to(model.device)
    ids: Tensor = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=settings,
        logits_processor=LogitsProcessorList([draw]),
    )
    return ids.cpu()


class _Draw(LogitsProcessor):
    """Leaves each window one token: the most probable one, or one that is drawn with the window's own generator."""

    def __init__(self, certain: Sequence[int], seeds: Sequence[int], never: Sequence[int], progress: Advance):
        self.certain, self.never, self.progress = certain, list(never), progress
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values = scores.float().cpu().clone()
        values[:, self.never] = -torch.inf
        written = input_ids.shape[1]
        picks = [
            int(row.argmax()) if written < certain else _drawn(row, generator)
            for row, certain, generator in zip(values, self.certain, self.generators, strict=True)
        ]
        self.progress()
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(picks)), picks] = 0
        return only


def _drawn(scores: Tensor, generator: torch.Generator) -> int:
    lowest = scores.topk(min(_TOP, len(scores))).values[-1]
    probabilities = scores.masked_fill(scores < lowest, -torch.inf).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
