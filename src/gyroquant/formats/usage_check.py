"""Checks an export as it will be used: a prompt in one call, single tokens after it through the KV cache, and a padded
batch. Different kernels run in these cases, so a program can be right in one and wrong in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from gyroquant.formats.runtime import Runtime
from gyroquant.models.execution.predictions import divergence_terms, same_choice

PROMPT, SHORTER, STEPS = 32, 20, 32  # tokens
# The error of logits, relative to the largest, that is normal for a program as it runs by default. 8-bit activations,
# an 8-bit cache and bfloat16 together caused errors of up to 4.5e-2 in the measurements of docs/export.md.
DEFAULT_ERROR = 0.05
# As the program runs by default, one greedy token in this many may differ, near ties not counted: 30 of 32 have to be
# the same. The errors of such rounding have a tail. A kernel that took wrong scales changed 13 to 31 of 32 tokens.
_ONE_DIFFERS_IN = 16
PARTS = {
    "prompt_error": "a prompt in one call",
    "step_error": "single tokens after it",
    "batch_error": "a padded batch",
}


@dataclass(frozen=True)
class Usage:
    """The texts and logits of a model in use.

    prompt, shorter: the token ids of two texts, (length,).
    tokens: the greedy tokens after the prompt.
    read: the logits of the prompt, (length, words).
    steps: the logits of all `tokens` except the last, each read in its own call, (tokens - 1, words).
    batch: the logits of both texts, read as one padded batch, (length, words) for each.
    """

    prompt: Tensor
    shorter: Tensor
    tokens: list[int]
    read: Tensor
    steps: Tensor
    batch: list[Tensor]

    @property
    def scale(self) -> float:
        """The largest logit."""
        return float(torch.cat((self.read, self.steps)).abs().max())


def texts_of(ids: Tensor, steps: int, longest: int | None) -> tuple[Tensor, Tensor, int]:
    """A prompt, a shorter text and the number of tokens to generate, at most `steps`. Both texts come from `ids`, token
    ids of shape (length,). `longest` is the number of tokens that the model accepts, or None.
    """
    length = min(PROMPT, len(ids), longest // 2 if longest else PROMPT)
    shorter = max(1, min(SHORTER, length - 1))
    return ids[:length], ids[-shorter:], min(steps, longest - length if longest else steps)


def usage_of(reference: Runtime, prompt: Tensor, shorter: Tensor, count: int) -> Usage:
    """The usage of the reference model, with `count` greedy tokens."""
    read = reference.logits(prompt)
    tokens, rows = [int(read[-1].argmax())], [read[:0]]
    while len(tokens) < count:
        rows.append(reference.feed(torch.tensor([tokens[-1:]])))
        tokens.append(int(rows[-1][-1].argmax()))
    batch = reference.padded([prompt, shorter])
    return Usage(prompt, shorter, tokens, read, torch.cat(rows), batch)


def compare_usage(runtime: Runtime, usage: Usage, tolerance: float) -> dict[str, Any]:
    """How far a model is from the reference in the same usage.

    Returns, for each part, the largest difference of logits divided by the largest logit. For the prompt and the single
    tokens together: the KL divergence in nats a token, the agreement of the most likely token, and counts of greedy
    tokens. Both models read the same tokens, so a token that differs does not change later ones. A near tie is a
    differing token that an error of `tolerance` in the logits can explain.
    """
    ours = torch.cat((usage.read, usage.steps))
    read = runtime.logits(usage.prompt)
    steps = [read[:0], *(runtime.feed(torch.tensor([[token]])) for token in usage.tokens[:-1])]
    theirs = torch.cat((read, torch.cat(steps)))[:, : ours.shape[1]]
    length = len(usage.prompt)
    parts: dict[str, float | None] = {
        "prompt_error": _error(theirs[:length], ours[:length], usage.scale),
        "step_error": _error(theirs[length:], ours[length:], usage.scale),
        "batch_error": None,
    }
    if not runtime.unpadded:
        pairs = zip(runtime.padded([usage.prompt, usage.shorter]), usage.batch, strict=True)
        parts["batch_error"] = max(_error(a[:, : b.shape[1]], b, usage.scale) for a, b in pairs)
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return {
        "relative_logit_error": max(error for error in parts.values() if error is not None),
        **parts,
        **({"batch_not_run": runtime.unpadded} if runtime.unpadded else {}),
        "kl": float(divergence_terms(p, q).sum(-1).mean()),
        "top1_agreement": float(same_choice(p, q).float().mean()),
        **_greedy(theirs[length - 1 :], ours[length - 1 :], 2 * tolerance * usage.scale),
    }


def not_run(reason: str) -> dict[str, Any]:
    """As `compare_usage`, for a model that did not run."""
    counts = dict.fromkeys(("greedy_tokens", "greedy_tokens_alike", "greedy_near_ties"), 0)
    return {**dict.fromkeys(PARTS), "batch_not_run": reason, **counts}


def _error(theirs: Tensor, ours: Tensor, scale: float) -> float:
    if not len(ours):
        return 0.0
    return float((theirs - ours).abs().max()) / scale if theirs.isfinite().all() else inf


def _greedy(theirs: Tensor, ours: Tensor, lead: float) -> dict[str, int]:
    """Counts positions with the same most likely token. Of the others, counts the near ties: positions at which our
    logits of the two tokens differ by at most `lead`.
    """
    first, chosen = ours.max(-1), theirs.argmax(-1)
    same = first.indices == chosen
    difference = first.values - ours.gather(1, chosen[:, None])[:, 0]
    ties = ~same & (difference <= lead) & theirs.isfinite().all(-1)
    return {"greedy_tokens": len(same), "greedy_tokens_alike": int(same.sum()), "greedy_near_ties": int(ties.sum())}


def faults(measured: Mapping[str, Any], tolerance: float, exact: bool) -> list[str]:
    """Every reason why an export is not the model from which it was made, one sentence each.

    With `exact`, the logits have to be within the tolerance, and all greedy tokens except near ties have to be the
    same. Without, 30 of 32 greedy tokens have to be the same or near ties. An infinite tolerance allows everything.
    """
    if tolerance == inf:
        return []
    reasons = []
    for key, part in PARTS.items():
        error = measured[key]
        if exact and error is not None and not error <= tolerance:
            reasons.append(f"{part}: relative error of the logits {error:.1e}, allowed {tolerance:.0e}")
    count, alike, ties = (measured[key] for key in ("greedy_tokens", "greedy_tokens_alike", "greedy_near_ties"))
    if count - alike - ties > (0 if exact else count // _ONE_DIFFERS_IN):
        needed = count if exact else count - count // _ONE_DIFFERS_IN
        reasons.append(f"{alike} of {count} greedy tokens are the same and {ties} are near ties; {needed} are required")
    return reasons


def read_in_pieces(runtime: Runtime, ids: Tensor) -> Tensor:
    """The logits of a text, (length, words), read through the KV cache in the calls that `reading` gives. `ids` has
    shape (length,).
    """
    runtime.start()
    sizes = reading(len(ids))
    ends = [*range(sizes["first"], len(ids) - sizes["single"], sizes["chunk"])]
    ends += range(len(ids) - sizes["single"], len(ids))
    starts = [0, *ends]
    return torch.cat([runtime.feed(ids[None, a:b]) for a, b in zip(starts, [*ends, len(ids)], strict=True) if a < b])


def reading(length: int) -> dict[str, int]:
    """The sizes of the calls in which a window of `length` tokens is read.

    first: tokens in the first call.
    chunk: tokens in each further call.
    single: tokens at the end that are read one at a time.

    Within a call, a program attends to unrounded keys and values. Those of earlier calls are rounded if the cache
    rounds them. A single call over the window would therefore not measure the cache.
    """
    return {"window": length, "first": max(1, length // 4), "chunk": max(1, length // 8), "single": length // 16}
