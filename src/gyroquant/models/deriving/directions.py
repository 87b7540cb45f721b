"""Which vectors are multiples of which: the evidence that a layer reads or writes a basis.

A layer reads the output of a norm if each row of its input is a multiple of a row of that output. A multiple, because
scalars may stand between: multipliers, routing weights, a norm without a gain. It writes to the residual stream if each
row of the gradient of its output is a multiple of a row of the gradient of the stream.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PARALLEL = 1e-4
"""The largest sine of the angle between two vectors that count as multiples of each other (fp32)."""


def directions(tensor: Tensor, width: int) -> Tensor:
    """The vectors of `width` coordinates in a tensor, as rows of length 1; rows of zeros are left out."""
    rows = tensor.detach().double().reshape(-1, width)  # in fp32, a cosine does not tell small angles apart
    norms = rows.norm(dim=1, keepdim=True)
    kept = norms[:, 0] > 1e-12 * norms.max().clamp_min(1e-30)
    return rows[kept] / norms[kept]


def among(rows: Tensor, others: Tensor) -> bool:
    """Whether each row of `rows` is a multiple of a row of `others`; both are results of `directions`."""
    if not len(rows) or not len(others) or rows.shape[1] != others.shape[1]:
        return False
    return bool(_multiples(rows, others).all())


def _multiples(rows: Tensor, others: Tensor) -> Tensor:
    if not len(others):
        return torch.zeros(len(rows), dtype=torch.bool)
    chosen = others[(rows @ others.T).abs().max(1).indices]
    along = (rows * chosen).sum(1, keepdim=True)
    return (rows - along * chosen).norm(dim=1) <= PARALLEL


class Space:
    """Vectors of a residual stream: for every token the vectors of all its streams, of which there is usually one.

    A model with several streams mixes them by numbers, so a vector belongs to the space if it lies in the span of the
    streams of one token.
    """

    def __init__(self, tokens: int, width: int):
        self.tokens, self.width = tokens, width
        self.bases: dict[int, list[Tensor]] = {}
        self.sums: list[Tensor] = []
        """For each tensor that was added, the sum over tokens of each of its streams."""

    def add(self, tensor: Tensor | None) -> None:
        """Adds a tensor of shape (batch, length, width), (batch, length, streams, width) or (streams, batch, ...)."""
        if tensor is None or tensor.numel() % (self.tokens * self.width):
            return
        streams = tensor.numel() // (self.tokens * self.width)
        value = tensor.detach().double()
        if streams > 1 and value.dim() == 4 and value.shape[0] == streams and value.shape[1:3].numel() == self.tokens:
            value = value.permute(1, 2, 0, 3)
        rows = value.reshape(self.tokens, streams, self.width)
        self.sums.append(rows.sum(0))
        norms = rows.norm(dim=-1, keepdim=True)
        kept = norms[:, :, 0].min(1).values > 1e-12 * norms.max().clamp_min(1e-30)
        rows = (rows / norms.clamp_min(1e-30))[kept]
        if streams > 1:
            rows = torch.linalg.svd(rows, full_matrices=False).Vh  # streams may depend on each other
        self.bases.setdefault(streams, []).append(rows)

    def contains(self, rows: Tensor) -> bool:
        """Whether every row, a result of `directions`, is a multiple of a vector of the space."""
        if not len(rows) or rows.shape[1] != self.width:
            return False
        inside = torch.zeros(len(rows), dtype=torch.bool)
        for streams, found in self.bases.items():
            if streams == 1:
                inside |= _multiples(rows, torch.cat(found)[:, 0])
                continue
            basis = torch.cat(found)
            shares = torch.einsum("nd,tkd->ntk", rows, basis)
            nearest = shares.square().sum(-1).max(1).indices
            along = torch.einsum("nk,nkd->nd", shares[torch.arange(len(rows)), nearest], basis[nearest])
            inside |= (rows - along).norm(dim=1) <= PARALLEL
        return bool(inside.all())


def columns_of(part: Tensor, whole: Tensor) -> Tensor | None:
    """The column of `whole` that equals each column of `part`. None if one has no equal. Both have the same rows."""
    if part.shape[0] != whole.shape[0] or part.shape[1] > whole.shape[1]:
        return None
    scale = whole.abs().max().clamp_min(1e-30)
    distance = torch.cdist(part.T.double() / scale, whole.T.double() / scale, p=float("inf"))
    error, index = distance.min(1)
    return index if float(error.max()) <= 1e-5 else None


def centres(x: Tensor, y: Tensor) -> bool:
    """Whether y is x without its mean, times a number for each vector: a LayerNorm without a gain."""
    centred = x.detach().double() - x.detach().double().mean(-1, keepdim=True)
    return among(directions(y, y.shape[-1]), directions(centred, y.shape[-1]))


def norm_form(
    x: Tensor, y: Tensor, gain: Tensor | None, bias: Tensor | None
) -> tuple[Literal["rms", "layer"], float] | None:
    """The kind of a norm from x to y, and the number that it adds to its stored gain. None if it is neither.

    A norm may also multiply its output by a number, which no map notices.
    """
    x, y = x.detach().double().reshape(-1, x.shape[-1]), y.detach().double().reshape(-1, y.shape[-1])
    if gain is None:
        return None
    shift = 0.0 if bias is None else bias.detach().double()
    gain = gain.detach().double()
    kinds: tuple[tuple[Literal["rms", "layer"], Tensor], ...] = (
        ("rms", x),
        ("layer", x - x.mean(-1, keepdim=True)),
    )
    for kind, centred in kinds:
        for offset in (0.0, 1.0):
            expected = centred * (gain + offset)
            seen = y - shift
            factor = (expected * seen).sum(-1, keepdim=True) / (expected * expected).sum(-1, keepdim=True)
            error = (seen - factor * expected).norm(dim=-1) / seen.norm(dim=-1).clamp_min(1e-30)
            if float(error.max()) <= PARALLEL:
                return kind, offset
    return None
