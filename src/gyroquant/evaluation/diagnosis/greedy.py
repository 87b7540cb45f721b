"""Greedy continuations, and the first step at which two models choose differently.

The original's greedy continuation is computed by Jacobi iteration (Santilli et al., arXiv 2305.10427). A pass over a
guess gives the choice at every position. Those up to the first wrong token of the guess are right; all choices are the
next guess. The result is the same as with one token a pass, in at most as many passes.

The rounded model needs one pass over that text. Up to the first token that its own greedy continuation chooses
differently, both are the same text, so the first position at which its choice is not the original's is that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gyroquant.evaluation.perplexity import after_blocks
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import evaluating
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance


@torch.no_grad()
def choices(store: WeightStore, input_ids: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The most likely next token at every position of `input_ids`. Both have shape (sequences, length)."""
    chosen = torch.empty(input_ids.shape, dtype=torch.long)
    with evaluating(store.skeleton()):
        stream, outer = after_blocks(store, input_ids, dtype, device, lambda: None)
        with attached(store.skeleton(), store.graph.around_blocks(store.online)):
            for number, start, logits in stream.logits(outer):
                chosen[number, start : start + len(logits)] = logits.argmax(-1).cpu()
    return chosen


def continuations(
    store: WeightStore, text: Tensor, prompt: int, dtype: torch.dtype, device: str, advance: Advance
) -> Tensor:
    """`text`, shape (sequences, length), with the model's greedy continuation in place of what follows its prompts.

    The first `prompt` tokens of each are the prompt; the others are the first guess. Reports progress once a step of
    all continuations.
    """
    text, steps, known = text.clone(), text.shape[1] - prompt, 0
    while known < steps:
        chosen = choices(store, text, dtype, device)[:, prompt - 1 : -1]
        same = int((chosen == text[:, prompt:]).long().cumprod(1).sum(1).min())
        text[:, prompt:] = chosen
        for _ in range(min(steps, same + 1) - known):
            advance()
        known = min(steps, max(known, same + 1))
    return text


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The number of the first step, from 1 on, at which two lists of choices differ. None if there is none."""
    return next((step for step, (a, b) in enumerate(zip(first, second, strict=True), 1) if a != b), None)


def summary(steps: Sequence[int | None], lengths: Sequence[int]) -> dict[str, Any]:
    """The distribution of first differing steps over texts.

    - first: the step of each text, or None.
    - different: the share of texts that differ.
    - median: the median step; texts without a difference count as longer than all steps, and None stands for that.
    - lengths: how many steps each text has.
    """
    middle = median([float("inf") if step is None else step for step in steps])
    return {
        "texts": len(steps),
        "different": sum(step is not None for step in steps) / len(steps),
        "median": None if middle == float("inf") else middle,
        "first": list(steps),
        "lengths": list(lengths),
    }
