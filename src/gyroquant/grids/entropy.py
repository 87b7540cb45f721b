"""The entropy of codes: the bits that they need at least if an entropy coder stores them one by one.

WaterSIC (arXiv 2603.04956) counts the size of a layer in this way. Codes of a fixed grid take as many bits in a file as
the grid has, whatever their entropy is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gyroquant.grids.base import QuantizedWeight, stored_bits


def code_entropy(codes: Tensor) -> float:
    """The entropy of the frequencies of codes of any shape, uint8, in bits a code. 0 if all are the same."""
    counts = torch.bincount(codes.reshape(-1)).double()
    shares = counts[counts > 0] / max(1, codes.numel())
    return float(-(shares * shares.log2()).sum()) + 0.0  # no negative zero


def code_bits(weight: QuantizedWeight, arrays: Mapping[str, Tensor]) -> float:
    """The bits that the codes of a matrix need, never more than those of its stored array `codes` in `arrays`.

    All codes of the matrix count as drawn independently from its one distribution of codes.
    """
    return min(stored_bits({"codes": arrays["codes"]}), code_entropy(weight.codes) * weight.codes.numel())
