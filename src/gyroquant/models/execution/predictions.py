"""Compares two predictions of the next token, token by token. `evaluation.divergence` sums the results."""

from __future__ import annotations

from torch import Tensor


def divergence_terms(wanted: Tensor, predicted: Tensor) -> Tensor:
    """The terms of the KL divergence of `predicted` from `wanted`, in nats, shape (..., vocabulary).

    Both arguments are log-probabilities of this shape. The sum over the last dimension is the divergence of a position.
    """
    return wanted.exp() * (wanted - predicted)


def same_choice(wanted: Tensor, predicted: Tensor) -> Tensor:
    """Whether both have the same most likely token: bool, shape (...). Top-1 agreement counts these."""
    return wanted.argmax(-1) == predicted.argmax(-1)
