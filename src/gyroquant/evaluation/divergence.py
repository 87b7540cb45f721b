"""How far one model's predictions are from another's: KL divergence in nats a token, and top-1 agreement.

Arguments are log-probabilities of shape (..., vocabulary). There are two sums of the same terms, because fp32 adds them
in different orders, and recorded numbers must not change in the last digit. `mean_divergence` sums each token first; it
is for training and bit allocation. `summed_divergence` sums a whole window at once; it is for evaluation.
"""

from __future__ import annotations

from torch import Tensor

from gyroquant.models.execution.predictions import divergence_terms, same_choice


def mean_divergence(wanted: Tensor, predicted: Tensor, top: int | None = None) -> Tensor:
    """The mean over tokens of the KL divergence of `predicted` from `wanted`, in nats; differentiable.

    With `top`, both distributions are restricted to as many of the likeliest tokens of `wanted` (OSTQuant's KL-Top,
    arXiv 2501.13987).
    """
    if top is not None and top < wanted.shape[-1]:
        best = wanted.topk(top, dim=-1).indices
        wanted, predicted = (x.gather(-1, best).log_softmax(-1) for x in (wanted, predicted))
    return divergence_terms(wanted, predicted).sum(-1).mean()


def summed_divergence(wanted: Tensor, predicted: Tensor) -> Tensor:
    """The sum over tokens of the KL divergence of `predicted` from `wanted`, in nats."""
    return divergence_terms(wanted, predicted).sum()


def agreeing(wanted: Tensor, predicted: Tensor) -> Tensor:
    """At how many positions both have the same most likely token: a whole number, shape ()."""
    return same_choice(wanted, predicted).sum()
