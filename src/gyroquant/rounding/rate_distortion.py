"""The rate-distortion bound of a rounded layer: the least error that any code with the same bits can reach.

A layer's error on its calibration tokens, ``|X (W - Q)^T|^2``, is a squared error in the basis in which ``X^T X`` is
diagonal, weighted by its eigenvalues. For independent Gaussian weights of the layer's variance, reverse water-filling
over the eigenvalues gives the least error at a rate, and the least rate for an error (Cover and Thomas, Elements of
Information Theory, section 10.3). The bound holds for codes of any length and shape. A grid that rounds each number by
itself stays 0.25 bits (1.53 dB) above it, even at high rates and with perfect entropy coding. Weights that are not
Gaussian can lie below it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RateDistortion:
    """A rounded layer compared with the bound.

    - `bits`: the layer's true bits per weight.
    - `output_error`: the bound on its relative squared output error at these bits.
    - `decibels`: the distance of the layer's error to the bound, in decibels. Negative if it lies below the bound.
    - `excess_bits`: the same distance in bits per weight.
    """

    bits: float
    output_error: float
    decibels: float
    excess_bits: float


def spectrum(gram: Tensor) -> Tensor:
    """The eigenvalues of second moments in falling order, fp64, negative ones set to 0."""
    return torch.linalg.eigvalsh(gram.float()).flip(0).double().clamp_min(0)


def least_error(variances: Tensor, bits: float) -> float:
    """The least mean squared error of independent Gaussians with these falling variances, at `bits` each on average."""
    positive = variances[variances > 0]
    if not len(positive):
        return 0.0
    count = torch.arange(1, len(positive) + 1, dtype=torch.float64, device=positive.device)
    # If the k largest lie above the water level, the sum of their rates, log(variance / level) / 2, fixes the level.
    level = torch.exp(positive.log().cumsum(0) / count - 2 * math.log(2) * bits * len(variances) / count)
    active = max(1, int((level <= positive).sum()))
    return float(positive.clamp(max=float(level[active - 1])).sum()) / len(variances)


def least_bits(variances: Tensor, error: float) -> float:
    """The inverse of `least_error`: the least bits for a mean squared error. Infinite for an error of 0."""
    total = error * len(variances)
    if total >= float(variances.sum()):
        return 0.0
    if total <= 0:
        return math.inf
    rest = variances.flip(0).cumsum(0).flip(0) - variances  # the sum of all smaller ones
    count = torch.arange(1, len(variances) + 1, dtype=torch.float64, device=variances.device)
    level = (total - rest) / count
    active = max(1, int((level <= variances).sum()))
    ratios = variances[:active] / level[active - 1]
    return float(ratios.clamp_min(1).log2().sum()) / 2 / len(variances)


def rate_distortion(
    weight: Tensor, eigenvalues: Tensor, output_error: float, energy: float, bits: float
) -> RateDistortion | None:
    """Compares a rounded matrix of shape (out, in) with the bound; None if its output or its error is zero.

    `energy` is the squared output of the unrounded matrix, and `output_error` is relative to it. `eigenvalues` are
    those of the second moments of its input.
    """
    if energy <= 0 or output_error <= 0:
        return None
    variances = eigenvalues * float(weight.double().square().mean())
    bound = least_error(variances, bits) * weight.numel() / energy
    needed = least_bits(variances, output_error * energy / weight.numel())
    return RateDistortion(bits, bound, 10 * math.log10(output_error / max(bound, 1e-300)), bits - needed)
