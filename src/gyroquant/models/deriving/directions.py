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
    rows = tensor.detach().float().reshape(-1, width)
    norms = rows.norm(dim=1, keepdim=True)
    kept = norms[:, 0] > 1e-12 * norms.max().clamp_min(1e-30)
    return rows[kept] / norms[kept]


def among(rows: Tensor, others: Tensor) -> bool:
    """Whether each row of `rows` is a multiple of a row of `others`; both are results of `directions`."""
    if not len(rows) or not len(others) or rows.shape[1] != others.shape[1]:
        return False
    cosines, nearest = (rows @ others.T).abs().max(1)
    if float(cosines.min()) < 0.999:
        return False
    chosen = others[nearest]
    along = (rows * chosen).sum(1, keepdim=True)
    return float((rows - along * chosen).norm(dim=1).max()) <= PARALLEL


def columns_of(part: Tensor, whole: Tensor) -> Tensor | None:
    """The column of `whole` that equals each column of `part`. None if one has no equal. Both have the same rows."""
    if part.shape[0] != whole.shape[0] or part.shape[1] > whole.shape[1]:
        return None
    scale = whole.abs().max().clamp_min(1e-30)
    distance = torch.cdist(part.T.double() / scale, whole.T.double() / scale, p=float("inf"))
    error, index = distance.min(1)
    return index if float(error.max()) <= 1e-5 else None


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
