"""Conformal prediction sets: how many tokens a model needs to name to hold the right one with a given probability.

Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates, arXiv 2107.07511). The score of a token is
``1 - p(token)``. With n scores of calibration tokens, the threshold is the score of rank ``ceil((n + 1) coverage)``,
and the set of a prediction holds every token whose score is not above it. If all tokens are exchangeable, such a set
holds the right token with at least this probability. Arxiv 2606.01850 compares compressed models by the mean size of
their sets. The tokens of a text are not exchangeable, so the coverage that was reached is measured too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError


def least_probability(right: Tensor, coverage: float) -> float:
    """The least probability of a token that belongs to a prediction set.

    `right`, shape (n,), has the probabilities of the right tokens of the calibration half. The result is 1 minus the
    conformal threshold of the scores. Raises InputError if there are too few tokens for a finite threshold.
    """
    rank = math.ceil((len(right) + 1) * coverage)
    if rank > len(right):
        raise InputError(f"{len(right)} tokens are too few to calibrate prediction sets of coverage {coverage}")
    return float(right.nan_to_num(0.0).sort(descending=True).values[rank - 1])


class PredictionSets:
    """Prediction sets of one model: the first half of the tokens calibrates, the second half is measured.

    - tokens: how many tokens will come, in the order of the text.
    - coverage: the probability with which a set shall hold the right token.
    """

    def __init__(self, tokens: int, coverage: float):
        self.half, self.coverage = tokens // 2, coverage
        self._right: list[Tensor] = []
        self._calibrated = 0
        self._least = 0.0
        self._sizes: list[Tensor] = []
        self._held: list[Tensor] = []

    def see(self, probabilities: Tensor, wanted: Tensor) -> None:
        """Takes the next predictions, shape (tokens, vocabulary), and the tokens that came, shape (tokens,)."""
        right = probabilities.gather(1, wanted[:, None])[:, 0]
        first = min(self.half - self._calibrated, len(right))
        if first:
            self._right.append(right[:first].cpu())
            self._calibrated += first
            if self._calibrated == self.half:
                self._least = least_probability(torch.cat(self._right), self.coverage)
        if first < len(right):
            self._sizes.append((probabilities[first:] >= self._least).sum(1).cpu())
            self._held.append((right[first:] >= self._least).cpu())

    def summary(self) -> dict[str, Any]:
        """The mean and the median size of the measured sets, in tokens; the share that holds the right token; and the
        least probability of a token in a set.
        """
        sizes, held = torch.cat(self._sizes).double(), torch.cat(self._held).double()
        return {
            "set_size": float(sizes.mean()),
            "median_set_size": float(sizes.median()),
            "coverage": float(held.mean()),
            "least_probability": self._least,
        }
