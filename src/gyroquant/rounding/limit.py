"""How far a rounded layer is from what any code of as many bits could reach: the rate-distortion bound.

A layer's error on its calibration tokens, ``|X (W - Q)^T|^2``, is a squared error in the basis in which ``X^T X`` is
diagonal, weighted by its eigenvalues. For independent Gaussian weights of the layer's variance, reverse water-filling
over the eigenvalues gives the least error at a rate, and the least rate for an error (Cover and Thomas, Elements of
Information Theory, section 10.3). It holds for codes of any length and shape; a grid of plain numbers, one at a time,
stays 0.25 bits (1.53 dB) above it even at high rates and with perfect entropy coding. Weights that are no Gaussians can
lie below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limit:
    """Where a layer stands: the bits that it takes per weight, the bound on its relative squared output error at these
    bits, and how far above the bound it is, in decibels of error and in bits (negative where it lies below).
    """

    bits: float
    output_error: float
    decibels: float
    excess_bits: float


def spectrum(gram: Tensor) -> Tensor:
    """The eigenvalues of second moments, falling, fp64, none negative."""
    return torch.linalg.eigvalsh(gram.float()).flip(0).double().clamp_min(0)


def least_error(variances: Tensor, bits: float) -> float:
    """The least mean squared error of independent Gaussians of these falling variances at `bits` each on average."""
    found = variances[variances > 0]
    if not len(found):
        return 0.0
    count = torch.arange(1, len(found) + 1, dtype=torch.float64, device=found.device)
    # with the k largest above the water, its level makes their rates, half the log of variance over level, add up
    level = torch.exp(found.log().cumsum(0) / count - 2 * math.log(2) * bits * len(variances) / count)
    active = max(1, int((level <= found).sum()))
    return float(found.clamp(max=float(level[active - 1])).sum()) / len(variances)


def least_bits(variances: Tensor, error: float) -> float:
    """The inverse of `least_error`: the least bits for a mean squared error; infinite for none at all."""
    total = error * len(variances)
    if total >= float(variances.sum()):
        return 0.0
    if total <= 0:
        return math.inf
    rest = variances.flip(0).cumsum(0).flip(0) - variances  # the sum of all that are smaller
    count = torch.arange(1, len(variances) + 1, dtype=torch.float64, device=variances.device)
    level = (total - rest) / count
    active = max(1, int((level <= variances).sum()))
    ratios = variances[:active] / level[active - 1]
    return float(ratios.clamp_min(1).log2().sum()) / 2 / len(variances)


def limit(weight: Tensor, eigenvalues: Tensor, output_error: float, energy: float, bits: float) -> Limit | None:
    """Where a rounded matrix of shape (out, in) stands; None for one whose output is nothing or that lost nothing.

    `energy` is the squared output of the unrounded matrix, of which `output_error` is a share, and `eigenvalues` are
    those of its input's second moments.
    """
    if energy <= 0 or output_error <= 0:
        return None
    variances = eigenvalues * float(weight.double().square().mean())
    bound = least_error(variances, bits) * weight.numel() / energy
    needed = least_bits(variances, output_error * energy / weight.numel())
    return Limit(bits, bound, 10 * math.log10(output_error / max(bound, 1e-300)), bits - needed)
