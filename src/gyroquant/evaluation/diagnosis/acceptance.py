"""The expected acceptance rate: how often a token of one model would be accepted by the other.

In speculative sampling a draft's token v, drawn from q, is accepted with probability min(1, p(v) / q(v)) (Leviathan et
al., arXiv 2211.17192, corollary 3.6). Its expectation is ``sum_v min(p(v), q(v)) = 1 - TV(p, q)``. SLQ (arXiv
2605.02404) takes it as the measure of a rounded model, and calls a model lossless in distribution from 0.99 on.
"""

from __future__ import annotations

from torch import Tensor

LOSSLESS = 0.99
"""From this rate on, SLQ calls a rounded model lossless in distribution."""


def acceptance(first: Tensor, second: Tensor) -> Tensor:
    """1 minus the total variation between two distributions, shape (...), from 0 to 1.

    Both arguments are probabilities of shape (..., vocabulary). Order does not matter. What is not a number counts as
    never accepted.
    """
    return (1 - (first - second).abs().sum(-1) / 2).nan_to_num(0.0).clamp(0.0, 1.0)
