"""The relative error of rounded weights."""

from __future__ import annotations

from torch import Tensor

from gyroquant.grids.base import lift


def in_reach(weight: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, multiplied by the same power of two if fp32 does not hold the squares of the weights.

    Relative errors do not change.
    """
    up = lift(weight)
    return (weight, rounded) if up == 1 else (weight * up, rounded * up)


def weight_error(weight: Tensor, rounded: Tensor) -> float:
    """``|W - Q|^2 / |W|^2``."""
    weight, rounded = in_reach(weight, rounded)
    return float((weight - rounded).square().sum() / weight.square().sum().clamp_min(1e-30))
