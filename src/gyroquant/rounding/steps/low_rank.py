"""Low-rank compensation: a layer becomes ``Q x + L (R x)``, with two narrow factors in fp16 beside its codes.

Let W be the weights, H the second moments of the layer's inputs, damped, and ``D = W - Q``. The branch that leaves the
least error in the layer's output, ``min |X (D - L R)^T|`` over all L R of rank r, follows from the singular value
decomposition: with ``S S^T = H``, ``L R`` is the best approximation of rank r to ``D S``, times ``S^-1``. Any other
quadratic objective over the product ``B = L R``, ``tr (B A B^T) - 2 tr (K B^T)``, has the same solution with A for H
and ``K A^-1`` for D.

Sources: SVDQuant (arXiv 2411.05007), ARHQ (arXiv 2605.00140), GPTQ-intrinsic low rank (arXiv 2606.01412).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.grids import Basis, LowRankFactors
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.rounding.base import InputStatistics, PreparedWeight, Solver, Warn, When
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.steps.base import LayerStep

_Pair = tuple[Tensor, Tensor]


class LowRank(LayerStep):
    """Adds a low-rank branch to every rounded layer. It costs ``16 rank (in + out)`` bits a layer.

    - `rank`: the number of columns of L. Default 16.
    - `position`: what the branch holds.
      - ``before``: a part of the weights themselves. The solver rounds the rest (SVDQuant).
      - ``inside``: the part of the rounding error along the r largest directions of the inputs. The solver rounds with
        the second moments without these directions (GPTQ-intrinsic low rank).
      - ``after`` (default): a part of the rounding error, after solver and refinement.
    - `metric`: which part.
      - ``plain``: the one with the largest numbers, by singular values. With ``inside``, R are the r directions.
      - ``hessian`` (default): the one that changes the layer's output most.
      - ``activation_residual``: the one that the rounding of activations changes most, from the second moments of what
        rounding changes in the inputs (ARHQ). With ``before`` only.
      - ``output_error``: the part of the output error, that of rounded activations included, that a branch on the
        unrounded inputs predicts best, by regression. With ``inside`` and ``after`` only. Without rounding of
        activations it is the same as ``hessian``.
    - `damp_percent`: the share of the mean second moment that is added to the diagonal. Default 0.01, as in GPTQ.
    """

    key = "low_rank"
    when = When.COMPENSATE

    rank: Annotated[int, Field(gt=0, le=4096)] = 16
    metric: Literal["plain", "hessian", "activation_residual", "output_error"] = "hessian"
    position: Literal["before", "inside", "after"] = "after"
    damp_percent: Annotated[float, Field(ge=0, le=1)] = 0.01

    @model_validator(mode="after")
    def _metric_fits_position(self) -> Self:
        if self.metric == "activation_residual" and self.position != "before":
            raise ValueError(
                f"metric activation_residual splits the weights before they are rounded, and position is "
                f"{self.position}: set position: before, or metric: output_error"
            )
        if self.metric == "output_error" and self.position == "before":
            raise ValueError(
                "metric output_error needs rounded weights, and position before has none yet: set position: after or "
                "inside, or metric: hessian or activation_residual"
            )
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(rank=4),
            cls(rank=4, metric="plain", position="before"),
            cls(rank=4, metric="plain", position="inside"),
        ]

    @property
    def needs_statistics(self) -> bool:  # type: ignore[override]
        return self.metric != "plain" or self.position == "inside"

    @property
    def needs_rounding_errors(self) -> bool:  # type: ignore[override]
        return self.metric in ("activation_residual", "output_error")

    @property
    def needs_rounded_inputs(self) -> bool:
        """Whether the layer's inputs must be rounded for it to make sense."""
        return self.metric == "activation_residual"

    def conflicts(self, solver: Solver) -> str:
        if self.position == "inside" and not solver.needs_statistics:
            return (
                f"low_rank.position inside changes the second moments, and the solver {solver.name} does not read "
                "them: take the solver gptq, or position: after"
            )
        if self.position == "after" and self.metric == "plain" and solver.needs_original:
            return (
                f"low_rank.metric plain would undo the correction of the solver {solver.name}: take metric: hessian, "
                "or the solver gptq"
            )
        return ""

    def problem(self, sections: Sequence[str], rounded: bool, solver: Solver) -> str:
        """The reason why a recipe cannot have this branch; empty if it can.

        - sections: those of `embeddings`, `head` and `weights.guided` that the recipe has.
        - rounded: whether solvers see rounded inputs.
        """
        if "weights.guided" in sections:
            return (
                "weights.guided has second moments of its own for groups of a layer's outputs, and a branch of "
                "weights.low_rank is one for all of them: leave one of the two out"
            )
        if sections:
            return f"weights.low_rank is for layers of blocks, and {sections[0]} is not one: leave one of the two out"
        if self.needs_rounded_inputs and not rounded:
            return (
                f"weights.low_rank.metric {self.metric} is of rounded inputs: give activations, with calibrate: true, "
                "or set metric: hessian"
            )
        if self.metric == "output_error" and rounded and solver.needs_original:
            return (
                f"weights.low_rank.metric output_error and the solver {solver.name} would both correct the rounding of "
                "inputs: take metric: hessian, or the solver gptq"
            )
        return ""

    def check_layers(self, graph: ModelGraph, targets: Mapping[str, LinearOp]) -> None:
        inside = {op.weight for op in graph.block_linears}
        for name, op in targets.items():
            if name not in inside:
                raise RecipeError(
                    f"weights.low_rank is for layers of blocks, and {op.name} is not in one: put it into "
                    "weights.ignore and leave head out, or leave low_rank out"
                )
            if op.entry.stacked or op.entry.intercepted:
                what = "holds stacked experts" if op.entry.stacked else "is a parameter that other code reads"
                raise UnsupportedModelError(
                    f"weights.low_rank needs layers that are modules of their own, and {op.name} {what}: add it to "
                    "weights.ignore, or leave low_rank out"
                )
            if self.rank > min(op.matrix_shape):
                raise RecipeError(
                    f"weights.low_rank.rank is {self.rank}, and {op.name} has only {min(op.matrix_shape)} "
                    f"{'outputs' if op.matrix_shape[0] <= op.matrix_shape[1] else 'inputs'}: set it to that or less"
                )

    def memory_bytes(self, rows: int, columns: int) -> int:
        square = 40 if self.position == "inside" else 24  # second moments, their factor, eigenvectors
        square += 24 if self.needs_rounding_errors else 0
        return square * columns**2 + 28 * rows * columns + 24 * min(rows, columns) ** 2

    def bits(self, op: LinearOp) -> int:
        """The bits stored for the factors of a layer."""
        return LowRankFactors.count_bits(self.rank, *op.matrix_shape)

    def before_solver(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        if self.position == "inside":
            assert prepared.statistics is not None
            values, vectors = _top(prepared.statistics, self.rank)
            return replace(prepared, statistics=_deflated(prepared.statistics, values, vectors), whole=prepared)
        if self.position == "after":
            return prepared
        factor = self._split_factor(prepared.statistics, prepared.matrix.device, warn)
        parts = (
            _truncated(_times_root(rows.double(), factor), self.rank) for rows in prepared.by_layer(prepared.matrix)
        )
        factors = tuple(_stored(_over_root(pair, factor), prepared.basis) for pair in parts)
        product = torch.cat([own.product() for own in factors])
        rest = prepared.matrix - (product if prepared.basis is None else prepared.basis.encode(product))
        return replace(prepared, matrix=rest, low_rank=factors, whole=prepared)

    def _split_factor(self, statistics: InputStatistics | None, device: torch.device, warn: Warn) -> Tensor | None:
        """The factor of the metric's second moments, on a device; None if the metric is plain."""
        if self.metric == "plain" or statistics is None:
            return None
        moments = statistics.second_moments
        if self.metric == "activation_residual":
            errors = statistics.rounding_error_second_moments
            moments = torch.zeros_like(moments) if errors is None else errors
        return inverse_factor(moments, self.damp_percent, warn).to(device)

    def apply(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
        if self.position == "before":
            return prepared
        whole, decoded = prepared.whole or prepared, prepared.decode()
        error = whole.matrix - decoded
        if self.metric == "plain":
            pairs = self._plain(prepared, error)
        else:
            assert whole.statistics is not None
            fit = _Fit(whole, self.metric == "output_error", self.damp_percent, warn)
            parts = (whole.by_layer(rows) for rows in (error, whole.matrix, decoded))
            pairs = [
                _over_root(_truncated(fit.wanted(*layer), self.rank), fit.factor) for layer in zip(*parts, strict=True)
            ]
        return replace(prepared, low_rank=tuple(_stored(pair, prepared.basis) for pair in pairs))

    def _plain(self, prepared: PreparedWeight, error: Tensor) -> list[_Pair]:
        """The factors of each layer by singular values, or along the directions that the solver left out."""
        if self.position == "after":
            return [_truncated(rows.double(), self.rank) for rows in prepared.by_layer(error)]
        assert prepared.whole is not None
        statistics = prepared.whole.statistics
        assert statistics is not None
        values, vectors = (part.to(error.device) for part in _top(statistics, self.rank))
        left = error.double() @ vectors
        if statistics.input_error_cross is not None:
            cross = statistics.input_error_cross.to(vectors) @ vectors
            left += prepared.whole.matrix.double() @ cross / values.clamp_min(1e-30)
        return [(rows, vectors.T) for rows in prepared.by_layer(left)]


class _Fit:
    """The regression of a layer's output error on the inputs of its branch.

    - `factor`: U, upper triangular, with ``U^T U = A^-1``. A are the second moments of the branch's inputs, damped.
    """

    def __init__(self, whole: PreparedWeight, unrounded: bool, damp_percent: float, warn: Warn):
        statistics = whole.statistics
        assert statistics is not None
        moments, cross = statistics.second_moments, statistics.input_error_cross
        device = whole.matrix.device
        self._cross = None if cross is None else cross.to(device, torch.float64)
        self._change: Tensor | None = None  # the sum of (u - x)^T u, for inputs u that are rounded to x
        self._corrected = whole.corrects_input_error
        if unrounded and statistics.rounding_error_cross is not None:
            assert statistics.rounding_error_second_moments is not None
            mixed, squares = statistics.rounding_error_cross.double(), statistics.rounding_error_second_moments.double()
            moments = moments.double() + mixed + mixed.T + squares
            self._change = (mixed + squares).to(device)
        self.factor = inverse_factor(moments, damp_percent, warn).to(device)

    def wanted(self, error: Tensor, weight: Tensor, decoded: Tensor) -> Tensor:
        """``K A^-1 S``, shape (out, in), fp64, for the matrices W - Q, W and Q of a layer.

        ``K = (wanted output - x Q^T)^T u`` and ``S S^T = A``. The wanted output is that of the unrounded model for the
        input error that the statistics have, else ``u W^T``. If the weights were changed to correct the input error, it
        is ``x W^T``, because the change corrects the rounding of inputs too.
        """
        found = _times_root(error.double(), self.factor)
        if self._cross is not None:
            found += weight.double() @ self._cross @ self.factor.T
        if self._change is not None:
            numbers = -error if self._corrected else decoded
            found += numbers.double() @ self._change @ self.factor.T
        return found


def _top(statistics: InputStatistics, rank: int) -> _Pair:
    """The largest eigenvalues of second moments and their eigenvectors, shapes (rank,) and (in, rank), fp64."""
    values, vectors = torch.linalg.eigh(statistics.second_moments.double())
    return values[-rank:].clamp_min(0), vectors[:, -rank:]


def _deflated(statistics: InputStatistics, values: Tensor, vectors: Tensor) -> InputStatistics:
    """The statistics of the inputs without their components along some eigenvectors, fp64."""
    moments = statistics.second_moments.double() - (vectors * values) @ vectors.T
    moments.diagonal().clamp_(min=0)
    cross = statistics.input_error_cross
    if cross is not None:
        cross = cross.double()
        cross = cross - cross @ vectors @ vectors.T
    return replace(statistics, second_moments=moments, input_error_cross=cross)


def _times_root(matrix: Tensor, factor: Tensor | None) -> Tensor:
    """``matrix S`` for ``S = U^-1``, where `factor` is U. None: S is the identity."""
    return matrix if factor is None else torch.linalg.solve_triangular(factor, matrix, upper=True, left=False)


def _over_root(pair: _Pair, factor: Tensor | None) -> _Pair:
    """The factors of ``L R S^-1``."""
    left, right = pair
    return left, right if factor is None else right @ factor


def _truncated(matrix: Tensor, rank: int) -> _Pair:
    """The factors, shapes (rows, rank) and (rank, columns), of the best approximation of that rank; fp64.

    They come from the eigenvectors of the smaller of ``M M^T`` and ``M^T M``: faster than all singular values.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        vectors = torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]
        return vectors, vectors.T @ matrix
    vectors = torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:]
    return matrix @ vectors, vectors.T


def _stored(pair: _Pair, basis: Basis | None) -> LowRankFactors:
    """The factors as they are stored, in the weights' own basis."""
    left, right = pair
    return LowRankFactors.of(left, right if basis is None else basis.decode(right))


__all__ = ["LowRank"]
