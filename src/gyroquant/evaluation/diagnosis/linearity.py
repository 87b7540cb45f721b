"""Linear replaceability of single blocks: how well one linear map predicts what a block adds to its input.

"Variance Is Not Importance" (arXiv 2604.20682) replaces a block by a linear map that is fitted on tokens, and reports
R^2 by block. Here the map goes from a token's input x to ``d = output - input``. It is fitted by ridge regression on
the first half of the tokens, ``W = (X^T X + l I)^-1 X^T D`` with centred X and D, and measured on the second half:
``R^2 = 1 - sum |d - d^|^2 / sum |d - mean|^2``. l is a multiple of ``trace(X^T X) / hidden``, one of RIDGES: the one
with the least error on the last quarter of the first half, when the rest of that half is fitted.

The first token of every window is left out. In many models its state is hundreds of times larger than the others
(arXiv 2402.17762), and R^2 would be about it alone. With few tokens for the width of the model, R^2 is low, because the
fit is poor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gyroquant.evaluation.diagnosis.hidden_states import BlockStates

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_TOKENS = 16384  # the tokens that are used, half of them for the fit
_AT_ONCE = 2048


class _Regression:
    """Ridge regression of outputs on inputs, both of shape (tokens, hidden), computed in fp64."""

    def __init__(self, inputs: Tensor, outputs: Tensor):
        hidden = inputs.shape[1]
        self.mean_in, self.mean_out = inputs.double().mean(0), outputs.double().mean(0)
        self.gram, self.cross = (torch.zeros(hidden, hidden, dtype=torch.float64) for _ in range(2))
        for x, d in zip(inputs.split(_AT_ONCE), outputs.split(_AT_ONCE), strict=True):
            centred = x.double() - self.mean_in
            self.gram += centred.T @ centred
            self.cross += centred.T @ (d.double() - self.mean_out)

    @property
    def possible(self) -> bool:
        """Whether there is anything to fit: finite inputs and outputs, and inputs that are not all the same."""
        return bool(self.gram.isfinite().all() and self.cross.isfinite().all()) and float(self.gram.trace()) > 0

    def squared_error(self, ridge: float, inputs: Tensor, outputs: Tensor) -> float:
        """The squared error on other tokens of the map that is fitted with a ridge, a multiple of the mean variance."""
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * gram.trace() / len(gram))
        weight = torch.cholesky_solve(self.cross, torch.linalg.cholesky(gram))
        return sum(
            float((d.double() - self.mean_out - (x.double() - self.mean_in) @ weight).square().sum())
            for x, d in zip(inputs.split(_AT_ONCE), outputs.split(_AT_ONCE), strict=True)
        )


def linear_r2(inputs: Tensor, outputs: Tensor) -> float | None:
    """R^2 on the second half of the tokens of a linear map that is fitted on the first half.

    `inputs` and `outputs` have shape (tokens, hidden). The result is 1 for an exact map and can be negative. None with
    fewer than 8 tokens, or if the held-out outputs are all the same or not finite.
    """
    half, part = len(inputs) // 2, 3 * (len(inputs) // 8)
    if part < 3:
        return None
    first, whole = (_Regression(inputs[:end], outputs[:end]) for end in (part, half))
    if not (first.possible and whole.possible):
        return None
    best = min(RIDGES, key=lambda ridge: first.squared_error(ridge, inputs[part:half], outputs[part:half]))
    held = outputs[half:].double()
    total = float((held - held.mean(0)).square().sum())
    left = whole.squared_error(best, inputs[half:], outputs[half:])
    return 1 - left / total if 0 < total < float("inf") else None


def replaceability(states: BlockStates) -> dict[str, Any]:
    """R^2 of a block of the original and of the rounded model, each on its own states, and the number of tokens."""
    pairs = ((states.before, states.after), (states.rounded_before, states.rounded_after))
    (original, tokens), (rounded, _) = (_of_model(before, after) for before, after in pairs)
    return {"block": states.index, "original": original, "rounded": rounded, "tokens": tokens}


def _of_model(before: Tensor, after: Tensor) -> tuple[float | None, int]:
    inputs, outputs = (x[:, 1:].flatten(0, -2)[:MOST_TOKENS].float() for x in (before, after))
    return linear_r2(inputs, outputs - inputs), len(inputs)
