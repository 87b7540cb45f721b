"""How far rounded weights are from the weights."""

from __future__ import annotations

from torch import Tensor

from gyroquant.grids.base import lift


def in_reach(weight: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Both times the same power of two, where fp32 does not hold the squares of the weights; shares of
    them stay what they are.
    """
    up = lift(weight)
    return (weight, rounded) if up == 1 else (weight * up, rounded * up)


def weight_error(weight: Tensor, rounded: Tensor) -> float:
    """``|W - Q|^2 / |W|^2``."""
    weight, rounded = in_reach(weight, rounded)
    return float((weight - rounded).square().sum() / weight.square().sum().clamp_min(1e-30))
