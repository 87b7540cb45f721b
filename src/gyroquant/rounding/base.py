"""What a rounding solver is: weights, statistics of their input and a grid -> codes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.grids.base import lift

Warn = Callable[[str], None]


@dataclass
class InputStatistics:
    """Second moments of a layer's input: `gram` is the sum of ``x^T x`` over `count` tokens, shape (in, in), fp32.

    With x0 the input that the unrounded model would have for the same token, `drift` is the sum of ``(x0 - x)^T x``
    (rows are features of x0 - x, columns features of x), fp32; None where it was not asked for or where x0 is not
    known, which solvers take as no drift. The difference is what is summed, because ``x0^T x`` and `gram` agree in
    most of their digits and the solvers need what is left of them, times an inverse. `spread` is the sum of
    ``(x0 - x)^T (x0 - x)``, where there is a drift.
    """

    gram: Tensor
    count: int
    drift: Tensor | None = None
    spread: Tensor | None = None

    def moved(self, change: Callable[[Tensor], Tensor]) -> InputStatistics:
        """The statistics in another basis, into which `change` brings second moments of shape (in, in)."""
        drift, spread = (None if one is None else change(one) for one in (self.drift, self.spread))
        return InputStatistics(change(self.gram), self.count, drift, spread)

    @property
    def cross(self) -> Tensor:
        """The sum of ``x0^T x``: rows are features of x0, columns features of x."""
        return self.gram if self.drift is None else self.gram + self.drift


class Solver(BaseModel, ABC):
    """A way to round. Subclasses register themselves under their `name` and have their options as fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kinds: ClassVar[dict[str, type[Solver]]] = {}
    needs_statistics: ClassVar[bool] = False
    """Whether the model must be run on calibration text to use this solver."""
    needs_original: ClassVar[bool] = False
    """Whether the solver wants the inputs that the unrounded model would have (`InputStatistics.drift`)."""

    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if not inspect.isabstract(cls):
            Solver.kinds[cls.model_fields["name"].default] = cls

    @abstractmethod
    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        """Rounds a matrix of shape (out, in), fp32, to a grid that is bound to it. Rows are independent of each other
        given grid and statistics.
        """


class ModelSolver(Solver):
    """A solver from outside that rounds all layers of a model at once, and is given the transformed model."""

    needs_statistics = True

    @abstractmethod
    def check(self) -> None:
        """Raises InputError, with the remedy, where what it calls is not installed."""

    @abstractmethod
    def round_model(
        self, model: Any, layers: Mapping[str, Grid], tokens: Tensor, tokenizer: Any, seed: int
    ) -> dict[str, QuantizedWeight]:
        """Rounds linear layers of a model, fp32, which it may spoil, to their grids; both by name of the module.

        `tokens` has the shape (samples, length).
        """

    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        raise TypeError(f"{self.name} rounds whole models")


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


def output_energy(weight: Tensor, statistics: InputStatistics) -> float:
    """``|X W^T|^2`` over the calibration tokens, from the second moments alone."""
    return float(((weight @ statistics.gram) * weight).sum())


def output_error(weight: Tensor, rounded: Tensor, statistics: InputStatistics) -> float:
    """``|X (W - Q)^T|^2 / |X W^T|^2`` over the calibration tokens, from the second moments alone."""
    weight, rounded = in_reach(weight, rounded)
    return output_energy(weight - rounded, statistics) / max(output_energy(weight, statistics), 1e-30)
