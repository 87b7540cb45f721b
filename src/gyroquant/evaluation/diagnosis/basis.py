"""The basis of a rounded model's residual stream, found from its embeddings.

A rotation R1 that is folded into the weights changes the basis of all hidden states, and files do not say which one it
was. It is the orthogonal matrix Q that brings the original's embeddings closest to the rounded model's: the orthogonal
Procrustes problem (Schoenemann 1966), ``min |E Q - E'|`` over all tokens, solved by the singular vectors of ``E^T E'``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Progress

_SAME = 1e-3  # up to this relative error of the embeddings, the basis is the same
_RANK = 1e-9  # a singular value below this fraction of the largest does not determine its direction
_LENGTH = 64  # tokens in a sequence; positions have no part in it
_SEQUENCES = 32  # sequences at once


@dataclass(frozen=True)
class Basis:
    """The change of basis from the original's hidden states to the rounded model's.

    - matrix: orthogonal, shape (hidden, hidden), fp32; states of the original are multiplied by it from the right.
      None if the basis is the same.
    - error: the relative error of the embeddings that is left, in the Frobenius norm over the vocabulary.
    - determined: whether the embeddings span all directions. If not, states cannot be compared.
    """

    matrix: Tensor | None
    error: float
    determined: bool = True

    def apply(self, states: Tensor) -> Tensor:
        """States of the original, shape (..., hidden), in the basis of the rounded model."""
        return states if self.matrix is None else (states.float() @ self.matrix).to(states)


def procrustes(cross: Tensor) -> tuple[Tensor, bool]:
    """The orthogonal Q for which ``|E Q - E'|`` is least, from ``cross = E^T E'``, shape (n, n), fp64.

    Also whether `cross` determines it, which needs full rank.
    """
    left, values, right = torch.linalg.svd(cross)
    return left @ right, bool(values[-1] > _RANK * values[0])


@torch.no_grad()
def residual_basis(
    store: WeightStore, against: WeightStore, device: str = "cpu", progress: Progress | None = None
) -> Basis:
    """The basis of the hidden states of `store` relative to those of its original, `against`."""
    hidden = against.graph.hidden
    cross = torch.zeros(hidden, hidden, dtype=torch.float64)
    squares, gap, others = 0.0, 0.0, 0.0
    runners = [(BlockRunner.of(model), _before_blocks(model, device)) for model in (against, store)]
    vocabulary = against.text_config.vocab_size
    length = min(_LENGTH, vocabulary)
    starts = range(0, vocabulary, length * _SEQUENCES)
    stage = (progress or Progress()).stage("basis", len(starts))
    with evaluating(against.skeleton()), evaluating(store.skeleton()), stage as advance:
        for first in starts:
            last = min(first + length * _SEQUENCES, vocabulary)
            rows = -(-(last - first) // length)
            ids = (first + torch.arange(rows * length)).clamp_max(vocabulary - 1).view(rows, length).to(device)
            ours, theirs = (runner.begin(ids, outer)[0].flatten(0, -2).double().cpu() for runner, outer in runners)
            cross += ours.T @ theirs
            squares += float(ours.square().sum())
            others += float(theirs.square().sum())
            gap += float((theirs - ours).square().sum())
            advance()
    if gap <= _SAME**2 * squares:
        return Basis(None, (gap / squares) ** 0.5)
    matrix, determined = procrustes(cross)
    left = max(0.0, squares + others - 2 * float((matrix * cross).sum()))
    if left > gap / 2:  # the basis is the same, and the embeddings are rounded
        return Basis(None, (gap / squares) ** 0.5)
    return Basis(matrix.float(), (left / squares) ** 0.5, determined)


def _before_blocks(store: WeightStore, device: str) -> dict[str, Tensor]:
    """The parameters outside the blocks but the heads, in fp32."""
    heads = {op.weight for op in store.graph.outer.readers("final")}
    tensors = store.read([name for name in store.graph.outer_params() if name not in heads])
    return {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in tensors.items()}
