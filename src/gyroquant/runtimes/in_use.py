"""An export is checked as it will be used: a prompt in one call, single tokens after it through the KV cache, and a
padded batch. A program may be right on the first and wrong on the others, because other kernels run there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from gyroquant.runtimes import Runtime

PROMPT, SHORTER, STEPS = 32, 20, 32  # tokens
# What a program may do to logits by default, relative to the largest: 8-bit activations, an 8-bit cache and bfloat16
# together did up to 4.5e-2 in what docs/export.md lists.
DEFAULT_ERROR = 0.05
# Beyond near ties one greedy token in so many may differ by default: 30 of 32 have to be the same. Such rounding has a
# tail, but a kernel that takes other scales changed 13 to 31 of 32.
_DIFFERENT = 16
PARTS = {
    "prompt_error": "a prompt in one call",
    "step_error": "single tokens after it",
    "batch_error": "a padded batch",
}


@dataclass(frozen=True)
class Usage:
    """What a model gives when it is used: `prompt` and `shorter` are token ids, (length,), `tokens` the greedy ones
    after the prompt; `read`, (length, words), are the logits of the prompt, `steps`, (tokens - 1, words), those of all
    these tokens but the last, each read by itself, and `batch` those of both texts as one padded batch.
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
    """From token ids, (length,): a prompt, a shorter text, and how many tokens may follow where a model takes no more
    than `longest` tokens.
    """
    length = min(PROMPT, len(ids), longest // 2 if longest else PROMPT)
    shorter = max(1, min(SHORTER, length - 1))
    return ids[:length], ids[-shorter:], min(steps, longest - length if longest else steps)


def usage_of(reference: Runtime, prompt: Tensor, shorter: Tensor, count: int) -> Usage:
    """Uses a model that is known to be right; `count` greedy tokens."""
    read = reference.logits(prompt)
    tokens, rows = [int(read[-1].argmax())], [read[:0]]
    while len(tokens) < count:
        rows.append(reference.feed(torch.tensor([tokens[-1:]])))
        tokens.append(int(rows[-1][-1].argmax()))
    batch = reference.padded([prompt, shorter])
    return Usage(prompt, shorter, tokens, read, torch.cat(rows), batch)


def compare_usage(runtime: Runtime, usage: Usage, tolerance: float) -> dict[str, Any]:
    """How far another model is from that, used in the same way: the largest difference of logits over the largest logit
    for each part, KL divergence in nats a token and agreement of the likeliest token on prompt and single tokens, and
    greedy tokens. Both read the same tokens, so that one token that differs changes no later one. A near tie is a
    token that differs where logits that are off by `tolerance` can make it so.
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
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        **_greedy(theirs[length - 1 :], ours[length - 1 :], 2 * tolerance * usage.scale),
    }


def _error(theirs: Tensor, ours: Tensor, scale: float) -> float:
    if not len(ours):
        return 0.0
    return float((theirs - ours).abs().max()) / scale if theirs.isfinite().all() else inf


def _greedy(theirs: Tensor, ours: Tensor, lead: float) -> dict[str, int]:
    """How many of the likeliest tokens are the same, and how many of the others lie no more than `lead` apart."""
    first, chosen = ours.max(-1), theirs.argmax(-1)
    same = first.indices == chosen
    behind = first.values - ours.gather(1, chosen[:, None])[:, 0]
    ties = ~same & (behind <= lead) & theirs.isfinite().all(-1)
    return {"greedy_tokens": len(same), "greedy_tokens_alike": int(same.sum()), "greedy_near_ties": int(ties.sum())}


def faults(measured: Mapping[str, Any], tolerance: float, exact: bool) -> list[str]:
    """Every reason why an export is not the model that it was made from, one sentence each. Run exactly, logits have to
    be within the tolerance; greedy tokens have to be the same but for near ties, by default 30 of 32. An infinite
    tolerance allows everything.
    """
    if tolerance == inf:
        return []
    found = []
    for key, part in PARTS.items():
        error = measured[key]
        if exact and error is not None and not error <= tolerance:
            found.append(f"{part}: relative error of the logits {error:.1e}, allowed {tolerance:.0e}")
    count, alike, ties = (measured[key] for key in ("greedy_tokens", "greedy_tokens_alike", "greedy_near_ties"))
    if count - alike - ties > (0 if exact else count // _DIFFERENT):
        needed = count if exact else count - count // _DIFFERENT
        found.append(f"{alike} of {count} greedy tokens are the same and {ties} near ties, needed are {needed}")
    return found


def read_in_pieces(runtime: Runtime, ids: Tensor) -> Tensor:
    """The logits of a text, ids of shape (length,), with the KV cache in play, as `reading` says: (length, words)."""
    runtime.start()
    sizes = reading(len(ids))
    ends = [*range(sizes["first"], len(ids) - sizes["single"], sizes["chunk"])]
    ends += range(len(ids) - sizes["single"], len(ids))
    starts = [0, *ends]
    return torch.cat([runtime.feed(ids[None, a:b]) for a, b in zip(starts, [*ends, len(ids)], strict=True) if a < b])


def reading(length: int) -> dict[str, int]:
    """How a window is read: so many tokens in a `first` call, further ones in calls of `chunk`, the last `single` ones
    one by one. A program attends to what stands in the same call as it is, and to what earlier calls left as its cache
    has rounded it: one call over the window would not see the cache.
    """
    return {"window": length, "first": max(1, length // 4), "chunk": max(1, length // 8), "single": length // 16}
