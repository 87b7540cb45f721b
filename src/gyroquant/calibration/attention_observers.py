"""Observers of attention: they see queries and keys after RoPE, and values, as the scores are made of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import Observer
from gyroquant.models.execution.online import observing_attention


class AttentionObserver(Observer, abstract=True):
    """Collects second moments of vectors of attention, for each kv head: `sums`, shape (heads, n, n), fp32.

    `count` is the number of vectors of a head. Called as other observers are, it sees the vectors of a single head.
    With several heads, it is larger than `size_in_bytes` by as many matrices.
    """

    def __init__(self, n: int):
        self.sums = torch.zeros(1, n, n)
        self.count = 0

    def __call__(self, x: Tensor) -> None:
        self.add(x.float().cpu()[None])

    def add(self, x: Tensor) -> None:
        """Adds vectors, shape (heads, vectors, n)."""
        if not self.count:
            self.sums = torch.zeros(len(x), *self.sums.shape[1:])
        self.sums.baddbmm_(x.transpose(1, 2), x)
        self.count += x.shape[1]

    @abstractmethod
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Adds a batch, shape (batch, heads, length, n) each, fp32. Several query heads share a head of the others."""

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 4 * n * n


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Vectors of shape (batch, several to a head, length, n) as (heads, vectors, n)."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)


class QueryMoments(AttentionObserver):
    """Second moments of the queries that share a kv head: what an error of its keys costs in scores."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.add(_by_head(queries, keys.shape[1]))


class KeyMoments(AttentionObserver):
    """Second moments and means of the keys of a kv head. `means` has shape (heads, n)."""

    def __init__(self, n: int):
        super().__init__(n)
        self._total = torch.zeros(1, n)

    def add(self, x: Tensor) -> None:
        self._total = self._total + x.sum(1) if self.count else x.sum(1)
        super().add(x)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.add(_by_head(keys, keys.shape[1]))

    @property
    def covariance(self) -> Tensor:
        """Shape (heads, n, n), fp64."""
        mean = self._total.double() / max(1, self.count)
        return self.sums.double() / max(1, self.count) - mean[:, :, None] * mean[:, None, :]


class ValueMoments(AttentionObserver):
    """Second moments of the values of all heads, each token weighted by how much its key excites the queries.

    The weight of token t is ``k_t (Q^T Q) k_t^T`` over the queries of its kv head, divided by its mean: section 3 of
    OSCAR (arXiv 2605.17757). Queries and mean are those of the batch.
    """

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        shared = keys.shape[1]
        grouped, k, v = _by_head(queries, shared), _by_head(keys, shared), _by_head(values, shared)
        weight = ((k @ (grouped.transpose(1, 2) @ grouped)) * k).sum(-1, keepdim=True)
        weight = weight / weight.mean(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        self.add((v * weight.sqrt()).flatten(0, 1)[None])


@contextmanager
def watching_attention(model: Any, observers: Mapping[str, Sequence[AttentionObserver]]) -> Iterator[None]:
    """Shows attention modules, by name, to observers for the duration of a with block."""
    undo: list[Callable[[], Any]] = []

    def shown(seen: Sequence[AttentionObserver]) -> Callable[[Tensor, Tensor, Tensor], None]:
        def observe(*parts: Tensor) -> None:
            queries, keys, values = (part.float().cpu() for part in parts)
            for observer in seen:
                observer.attend(queries, keys, values)

        return observe

    try:
        for module, seen in observers.items():
            undo += observing_attention(model, module, shown(seen))
        yield
    finally:
        for step in reversed(undo):
            step()


__all__ = ["AttentionObserver", "KeyMoments", "QueryMoments", "ValueMoments", "watching_attention"]
