"""Linear replaceability of single blocks: how well one linear map predicts what a block adds to its input.

"Variance Is Not Importance" (arXiv 2604.20682) replaces a block by a linear map that is fitted on tokens, and reports
R^2 by block. Here the map goes from a token's input x to ``d = output - input``. It is fitted by ridge regression on
the first half of the tokens, ``W = (X^T X + l I)^-1 X^T D`` with centred X and D and
``l = 1e-3 trace(X^T X) / hidden``, and measured on the second half: ``R^2 = 1 - sum |d - d^|^2 / sum |d - mean|^2``.

The first token of every window is left out. In many models its state is hundreds of times larger than the others
(arXiv 2402.17762), and R^2 would be about it alone. R^2 is low, and can be negative, if there are not several times as
many tokens as features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gyroquant.evaluation.diagnosis.hidden_states import BlockStates

RIDGE = 1e-3
MOST_TOKENS = 16384  # the tokens that are used, half of them for the fit
_AT_ONCE = 2048


def linear_r2(inputs: Tensor, outputs: Tensor) -> float | None:
    """R^2 on the second half of the tokens of a linear map that is fitted on the first half.

    `inputs` and `outputs` have shape (tokens, hidden). The result is 1 for an exact map and can be negative. None with
    fewer than 4 tokens, or if the held-out outputs are all the same or not finite.
    """
    half, hidden = len(inputs) // 2, inputs.shape[1]
    if half < 2:
        return None
    mean_in, mean_out = inputs[:half].double().mean(0), outputs[:half].double().mean(0)
    gram, cross = (torch.zeros(hidden, hidden, dtype=torch.float64) for _ in range(2))
    for x, d in zip(inputs[:half].split(_AT_ONCE), outputs[:half].split(_AT_ONCE), strict=True):
        centred = x.double() - mean_in
        gram += centred.T @ centred
        cross += centred.T @ (d.double() - mean_out)
    if not bool(gram.isfinite().all() and cross.isfinite().all()) or float(gram.trace()) == 0:
        return None
    gram.diagonal().add_(RIDGE * gram.trace() / hidden)
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
    held_mean = outputs[half:].double().mean(0)
    left = total = 0.0
    for x, d in zip(inputs[half:].split(_AT_ONCE), outputs[half:].split(_AT_ONCE), strict=True):
        wanted = d.double()
        left += float((wanted - mean_out - (x.double() - mean_in) @ weight).square().sum())
        total += float((wanted - held_mean).square().sum())
    return 1 - left / total if 0 < total < float("inf") else None


def replaceability(states: BlockStates) -> dict[str, Any]:
    """R^2 of a block of the original and of the rounded model, each on its own states, and the number of tokens."""
    pairs = ((states.before, states.after), (states.rounded_before, states.rounded_after))
    (original, tokens), (rounded, _) = (_of_model(before, after) for before, after in pairs)
    return {"block": states.index, "original": original, "rounded": rounded, "tokens": tokens}


def _of_model(before: Tensor, after: Tensor) -> tuple[float | None, int]:
    inputs, outputs = (x[:, 1:].flatten(0, -2)[:MOST_TOKENS].float() for x in (before, after))
    return linear_r2(inputs, outputs - inputs), len(inputs)
