"""Chooses the bits of each layer: a knapsack problem over measured costs, solved exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.optimize import Bounds, LinearConstraint, milp

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid

Choice = tuple[str, int]
"""A layer, as the name of its weight, and a number of bits for it."""


class Allocate(BaseModel):
    """Chooses the bits of every layer of the blocks.

    The cost of a choice is the KL divergence of the model's predictions when this layer alone is rounded.

    One of these two is the limit:

    - `budget`: true bits per rounded weight of the blocks: codes, scales and zero points.
    - `bytes`: the size of all weights of the result, rounded or not, as they are stored.

    Options:

    - `bits`: the bits that a layer may get. Default 2, 3 and 4.
    - `embeddings`: the bits that rounded embeddings and heads may get, if `bytes` is the limit. By default they are
      rounded as their sections say.
    - `nsamples`: windows of the calibration text on which costs are measured. Default 2.
    - `costs`: `measured` (default): the model runs for every choice, with the layer rounded by the recipe's solver.
      `gradient`: all choices from one backward pass, for rounding to nearest; heads are measured. Models with stacked
      experts are measured in any case.
    - `granularity`: `layers` (default), or `rows`: every row of a layer, which is one output, gets its own bits, by one
      order over all rows of the model (MixLLM, arXiv 2412.14590). Needs ``costs: gradient`` and the integer grid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    budget: Annotated[float, Field(gt=1)] | None = None
    bytes: Annotated[int, Field(gt=0)] | None = None
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (2, 3, 4)
    embeddings: tuple[Annotated[int, Field(ge=1, le=8)], ...] = ()
    nsamples: Annotated[int, Field(gt=0)] = 2
    costs: Literal["measured", "gradient"] = "measured"
    granularity: Literal["layers", "rows"] = "layers"

    @property
    def by_rows(self) -> bool:
        """Whether rows get bits, rather than layers."""
        return self.granularity == "rows"

    @model_validator(mode="after")
    def _rows_have_gradients(self) -> Allocate:
        if self.by_rows and self.costs != "gradient":
            raise ValueError("granularity: rows takes the costs of rows from one backward pass: set costs: gradient")
        return self

    @model_validator(mode="after")
    def _at_least_two_bits(self) -> Allocate:
        if len(set(self.bits)) < 2:
            raise ValueError(f"bits {list(self.bits)} leave nothing to choose: give two or more different numbers")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Allocate:
        if (self.budget is None) == (self.bytes is None):
            raise ValueError("give budget, in bits a weight of the blocks, or bytes, of the whole result")
        if self.embeddings and self.bytes is None:
            raise ValueError("embeddings needs bytes, because budget only counts the layers of the blocks")
        return self


def grids_by_bits(grid: Grid, bits: Iterable[int]) -> dict[int, Grid]:
    """The same grid at each of these bits."""
    return {count: grid.at_bits(count) for count in sorted(set(bits))}


def choose(costs: Mapping[Choice, float], sizes: Mapping[Choice, int], room: int) -> dict[str, int]:
    """For each layer, the bits that minimize the total cost while the total size, in bits, is at most `room`.

    Solved exactly, as an integer program. Raises RecipeError if no choice fits.
    """
    choices = sorted(costs)
    names = sorted({name for name, _ in choices})
    of_layer = np.array([[float(name == layer) for layer, _ in choices] for name in names])
    size = np.array([[float(sizes[choice]) for choice in choices]])
    cost = np.array([costs[choice] for choice in choices])
    solution = milp(
        cost / max(float(np.abs(cost).max()), 1e-30),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(of_layer, 1, 1), LinearConstraint(size / room, -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        least = sum(min(sizes[choice] for choice in choices if choice[0] == name) for name in names)
        raise RecipeError(
            f"weights.allocate has room for {room} bits, and the layers take at least {least}: raise its limit"
        )
    return {name: bits for (name, bits), taken in zip(choices, solution.x, strict=True) if taken > 0.5}
