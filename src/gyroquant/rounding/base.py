"""The base classes of rounding: a step, and a solver, the step that makes codes from weights, statistics and a grid."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.grids import Basis, Grid, LowRankFactors, QuantizedWeight
from gyroquant.grids.error import in_reach
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.registry import Registry, no_examples

Warn = Callable[[str], None]


@dataclass
class InputStatistics:
    """Statistics of a layer's input x. x0 is the input for the same token in the unrounded model.

    - `second_moments`: the sum of ``x^T x`` over the tokens, shape (in, in), fp32.
    - `count`: the number of tokens.
    - `input_error_cross`: the sum of ``(x0 - x)^T x``, fp32. Rows are features of x0 - x, columns features of x. None
      if no step needs it or x0 is not known; solvers then take x0 as equal to x. The difference is summed because
      ``x0^T x`` and ``x^T x`` agree in most digits, and solvers multiply their difference by an inverse.
    - `input_error_second_moments`: the sum of ``(x0 - x)^T (x0 - x)``, fp32. Computed only with `input_error_cross`,
      and only if a step needs it.
    - `rounding_error_cross`, `rounding_error_second_moments`: the sums of ``(u - x)^T x`` and ``(u - x)^T (u - x)``,
      fp32, if x is the rounded form of an input u (activation rounding). None if no step needs them or the input is
      not rounded.
    - `gradient_moments`: the second moments of the loss's gradient at the layer's outputs, damped, shape (out, out),
      fp32: the output factor of `weights.guided.kronecker`. None without it. Their scale has no effect.
    """

    second_moments: Tensor
    count: int
    input_error_cross: Tensor | None = None
    input_error_second_moments: Tensor | None = None
    rounding_error_cross: Tensor | None = None
    rounding_error_second_moments: Tensor | None = None
    gradient_moments: Tensor | None = None

    def moved(self, change: Callable[[Tensor], Tensor]) -> InputStatistics:
        """The statistics in another basis. `change` transforms second moments, shape (in, in), to that basis."""
        errors = (
            *(self.input_error_cross, self.input_error_second_moments),
            *(self.rounding_error_cross, self.rounding_error_second_moments),
        )
        moved = (None if sums is None else change(sums) for sums in errors)
        found = InputStatistics(change(self.second_moments), self.count, *moved)
        return replace(found, gradient_moments=self.gradient_moments)

    @property
    def cross(self) -> Tensor:
        """The sum of ``x0^T x``: rows are features of x0, columns features of x."""
        return self.second_moments if self.input_error_cross is None else self.second_moments + self.input_error_cross


@dataclass(frozen=True)
class PreparedWeight:
    """One matrix between two steps of rounding. A step takes it and returns a changed copy.

    - `name`: the name in messages.
    - `matrix`: the numbers to round, shape (out, columns), fp32, in the basis in which they are rounded.
    - `statistics`: the statistics of its input in that basis. None if no calibration token reached the matrix, or if
      no step needs statistics.
    - `basis`: the basis. None if the weight is rounded in its own basis.
    - `grid`: the grid, made for this matrix (`Grid.with_tensor_scale`). None until it is chosen.
    - `rounded`: the codes and scales so far, in that basis. None before the solver.
    - `rows`: the number of rows of each of the layers that the matrix consists of. Empty: it is one layer.
    - `low_rank`: the low-rank factors of each layer, in the weights' own basis. Empty without `weights.low_rank`.
    - `whole`: the matrix as it was before a step took a part of the problem away from the solver. None: no step did.
    - `corrects_input_error`: whether the matrix was changed to correct the input error.
    - `shares_grid`: whether other matrices are rounded to the same grid, so that its codebooks must stay as they are.
    """

    name: str
    matrix: Tensor
    statistics: InputStatistics | None
    basis: Basis | None
    grid: Grid | None = None
    rounded: QuantizedWeight | None = None
    rows: tuple[int, ...] = ()
    low_rank: tuple[LowRankFactors, ...] = ()
    whole: PreparedWeight | None = None
    corrects_input_error: bool = False
    shares_grid: bool = False

    def by_layer(self, rows: Tensor) -> tuple[Tensor, ...]:
        """A tensor with the rows of the matrix, split into those of each layer."""
        return rows.split(list(self.rows)) if self.rows else (rows,)

    def decode(self) -> Tensor:
        """The numbers that the codes stand for, in the basis, shape of `matrix`, fp32. Each call decodes them again."""
        assert self.rounded is not None, "decode() needs the codes of the solver"
        return replace(self.rounded, basis=None).dequantize()


class When(IntEnum):
    """When a step is applied. Steps run in this order. Steps with the same value run in the order of their keys."""

    BEFORE_SOLVER = 0
    """On each layer: changes the weights that the solver rounds."""
    SOLVER = 1
    """On each layer: makes codes and scales."""
    AFTER_SOLVER = 2
    """On each layer: improves codes and scales."""
    COMPENSATE = 3
    """On each layer: adds to the layer what its codes cannot hold."""
    TUNE_BLOCK = 4
    """On a block whose layers are all rounded: improves codes and scales."""
    CORRECT_BLOCK = 5
    """On a block whose codes are final: changes its parameters that are not rounded."""


class RoundingStep(BaseModel, ABC):
    """One step of rounding a layer or a block. Its fields are its options; the class declares what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: ClassVar[str]
    """The key in a recipe's `weights` that adds this step."""
    when: ClassVar[When]
    needs_statistics: ClassVar[bool] = False
    """Whether it reads `PreparedWeight.statistics`. Then the model runs on calibration text."""
    needs_original: ClassVar[bool] = False
    """Whether it reads `InputStatistics.input_error_cross`. Then the unrounded model runs beside the rounded one."""
    needs_input_error_second_moments: ClassVar[bool] = False
    """Whether it also reads `InputStatistics.input_error_second_moments`."""
    needs_rounding_errors: ClassVar[bool] = False
    """Whether it reads `InputStatistics.rounding_error_cross` and `rounding_error_second_moments` of rounded inputs."""
    uses_gradient_moments: ClassVar[bool] = False
    """Whether it uses `InputStatistics.gradient_moments` where they are known (`weights.guided.kronecker`)."""
    needs_block: ClassVar[bool] = False
    """Whether it reads the outputs of a whole block, rounded and unrounded."""
    needs_model: ClassVar[bool] = False
    """Whether it takes the whole model at once."""
    needs_single_codes: ClassVar[bool] = False
    """Whether it changes the code of one weight at a time, which grids with `tile_rows` above 1 do not allow."""
    random: ClassVar[bool] = False
    """Whether its result depends on the recipe's seed."""

    @classmethod
    def examples(cls) -> list[Self]:
        """Steps that cover the options of this class, for tests."""
        raise no_examples(cls)

    def apply(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        """The matrix after this step. Steps on blocks return it unchanged."""
        return prepared

    def before_solver(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        """The matrix for the solver, if the step takes a part of it away from the solver and acts again afterwards.

        It is called after all steps that run before the solver.
        """
        return prepared

    def for_layers(self) -> RoundingStep:
        """The step that rounds single layers: this step, or its replacement if it only rounds whole models."""
        return self

    def check(self) -> None:
        """Raises InputError, with the remedy, if a program or package that it calls is not installed."""

    def check_layers(self, graph: ModelGraph, targets: Mapping[str, LinearOp]) -> None:
        """Raises UnsupportedModelError if it cannot round one of the targets, given by the name of their weight."""

    def memory_bytes(self, rows: int, columns: int) -> int:
        """The memory in bytes for one matrix, if that is more than the memory model counts for every matrix; else 0."""
        return 0


class Solver(RoundingStep):
    """Chooses the codes of a layer. Subclasses register themselves under their `name`; their fields are their options.

    A new solver declares what it needs, and `gyroquant.testing.check_solver` tests these declarations.
    """

    registry: ClassVar[Registry[type[Solver]]] = Registry("solver", "gyroquant.rounding.solvers", error=RecipeError)
    key = "solver"
    when = When.SOLVER

    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if not inspect.isabstract(cls):
            Solver.registry.add(cls.model_fields["name"].default, cls)

    @abstractmethod
    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        """Rounds a matrix of shape (out, in), fp32, to a grid that was made for it.

        With grid and statistics given, each row, or each tile of rows (`Grid.tile_rows`), is rounded independently of
        the others.
        """

    def apply(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        assert prepared.grid is not None
        return replace(prepared, rounded=self.solve(prepared.matrix, prepared.grid, prepared.statistics, warn))

    def conflicts(self, sections: Sequence[str], grids: Sequence[Grid]) -> str:
        """The reason why it cannot be combined with these grids and these other keys of `weights`; empty if it can.

        The keys are those that change what is rounded, or how.
        """
        return ""

    def quantize_model(
        self, model: Any, layers: Mapping[str, Grid], tokens: Tensor, tokenizer: Any, seed: int
    ) -> dict[str, QuantizedWeight]:
        """Rounds linear layers of a model, fp32, to their grids. Only for solvers with `needs_model`.

        The keys of `layers` and of the result are names of modules. `tokens` has the shape (samples, length). The
        method may change the model.
        """
        raise TypeError(f"{self.name} rounds layer by layer")


class ExternalSolver(Solver):
    """A solver of another package. It gets the transformed model and rounds all its layers at once."""

    needs_statistics = True
    needs_model = True
    random = True

    @abstractmethod
    def check(self) -> None:
        """Raises InputError, with the remedy, if the package that it calls is not installed."""

    @abstractmethod
    def quantize_model(
        self, model: Any, layers: Mapping[str, Grid], tokens: Tensor, tokenizer: Any, seed: int
    ) -> dict[str, QuantizedWeight]:
        """As `Solver.quantize_model`."""

    def solve(
        self, weight: Tensor, grid: Grid, statistics: InputStatistics | None, warn: Warn = lambda text: None
    ) -> QuantizedWeight:
        raise TypeError(f"{self.name} rounds whole models")

    def for_layers(self) -> RoundingStep:
        """Round to nearest, which replaces an external solver where single layers are rounded."""
        return Solver.registry["rtn"](name="rtn")

    def conflicts(self, sections: Sequence[str], grids: Sequence[Grid]) -> str:
        if sections:
            return f"{self.name} rounds the whole model by itself: leave {', '.join(sections)} out"
        if not all(grid.plain_integers for grid in grids):
            return f"{self.name} rounds to integer grids only"
        return ""

    def check_layers(self, graph: ModelGraph, targets: Mapping[str, LinearOp]) -> None:
        inside = {op.weight for op in graph.block_linears}
        for name, op in targets.items():
            if name not in inside or op.entry.stacked or op.entry.transposed:
                raise UnsupportedModelError(
                    f"the solver {self.name} rounds only plain linear layers of blocks, and {op.name} is not one: "
                    "add it to weights.ignore, or take another solver"
                )


def output_energy(weight: Tensor, statistics: InputStatistics) -> float:
    """``|X W^T|^2`` over the calibration tokens, from the second moments alone."""
    return float(((weight @ statistics.second_moments) * weight).sum())


def output_error(weight: Tensor, rounded: Tensor, statistics: InputStatistics) -> float:
    """``|X (W - Q)^T|^2 / |X W^T|^2`` over the calibration tokens, from the second moments alone."""
    weight, rounded = in_reach(weight, rounded)
    return output_energy(weight - rounded, statistics) / max(output_energy(weight, statistics), 1e-30)
