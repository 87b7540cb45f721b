"""Which layer gets how many bits: a knapsack over measured costs, solved exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.optimize import Bounds, LinearConstraint, milp

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid

Choice = tuple[str, int]
"""A layer, by the name of its weight, and bits for it."""


class Allocate(BaseModel):
    """The bits of every layer within `budget`, true bits per rounded weight: codes, scales and zero points.

    Each layer of the blocks gets one of `bits`. What that costs is measured: the divergence of the model's prediction
    when this layer alone is rounded, by the recipe's solver, on `nsamples` windows of the calibration text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    budget: Annotated[float, Field(gt=1)]
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (2, 3, 4)
    nsamples: Annotated[int, Field(gt=0)] = 2

    @model_validator(mode="after")
    def _a_choice(self) -> Allocate:
        if len(set(self.bits)) < 2:
            raise ValueError(f"bits {list(self.bits)} leave nothing to choose: give two or more")
        return self


def grids_by_bits(grid: Grid, bits: Iterable[int]) -> dict[int, Grid]:
    """The same grid at other bits."""
    return {count: type(grid)(**grid.model_dump() | {"bits": count}) for count in sorted(set(bits))}


def choose(costs: Mapping[Choice, float], sizes: Mapping[Choice, int], room: int) -> dict[str, int]:
    """For each layer the bits of least total cost whose sizes, in bits, fit into `room` together.

    Solved exactly, as an integer program. Raises RecipeError when nothing fits.
    """
    choices = sorted(costs)
    names = sorted({name for name, _ in choices})
    one_each = np.array([[float(name == other) for other, _ in choices] for name in names])
    size = np.array([[float(sizes[choice]) for choice in choices]])
    cost = np.array([costs[choice] for choice in choices])
    found = milp(
        cost / max(float(np.abs(cost).max()), 1e-30),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size / room, -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        least = sum(min(sizes[choice] for choice in choices if choice[0] == name) for name in names)
        raise RecipeError(f"weights.allocate.budget holds {room} bits, and the layers take {least} at the least")
    return {name: bits for (name, bits), taken in zip(choices, found.x, strict=True) if taken > 0.5}
