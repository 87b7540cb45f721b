"""Rounds the linear layers of one block. Layers that read the same input are rounded together, experts one by one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from gyroquant.calibration.observers import GuidedSecondMoments, Key, SecondMoments, input_key, modules_with_own_map
from gyroquant.calibration.rounding_errors import RoundingErrors
from gyroquant.errors import RecipeError
from gyroquant.grids import Basis, Grid, GroupParams, MixedRowsGrid, QuantizedWeight, joined
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.graph.model_graph import Group, LinearOp, ModelGraph
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.base import InputStatistics, PreparedWeight, RoundingStep, Solver, Warn, When
from gyroquant.rounding.guided import KroneckerFactors
from gyroquant.rounding.solvers.rtn import on_grid
from gyroquant.rounding.weight_basis import WeightBasis


@dataclass(frozen=True)
class RoundingConfig:
    """How layers are rounded.

    - `steps`: the steps on each layer, in this order. One of them is the solver.
    - `grid`: the grid of all layers that are not in `others`.
    - `basis`: the basis in which weights are rounded. None: their own.
    - `warn`: called with the text of each warning.
    - `others`: grids of single layers, by the name of the layer's weight.
    - `row_places`: for layers on a `MixedRowsGrid`, the place of each row's width, int64 of shape (out,), by the name
      of the layer's weight.
    """

    steps: Sequence[RoundingStep]
    grid: Grid
    basis: WeightBasis | None
    warn: Warn
    others: Mapping[str, Grid] = field(default_factory=dict)
    row_places: Mapping[str, Tensor] = field(default_factory=dict)

    def grid_of(self, op: LinearOp) -> Grid:
        """The grid of a layer: the one in `others` for its weight's name, else `grid`, or what fits its rows."""
        return self.others.get(op.weight, self.grid).for_columns(op.in_features)

    def _basis(self, matrix: Tensor, statistics: InputStatistics | None) -> Basis | None:
        gram = None if statistics is None else statistics.second_moments
        return None if self.basis is None else self.basis.fit(matrix.shape[1], gram)

    def encoded(self, matrix: Tensor, statistics: InputStatistics | None) -> Tensor:
        """A matrix of shape (out, in), fp32, transformed to the basis in which it is rounded."""
        basis = self._basis(matrix, statistics)
        return matrix if basis is None else basis.encode(matrix)

    def prepare(self, name: str, matrix: Tensor, statistics: InputStatistics | None) -> PreparedWeight:
        """A matrix of shape (out, in), fp32, with its statistics, in the basis in which it is rounded."""
        basis = self._basis(matrix, statistics)
        if basis is None:
            return PreparedWeight(name, matrix, statistics, None)
        if statistics is None and basis.scale is not None:
            self.warn(f"{name}: {_NOT_REACHED}; its basis is not scaled")
        moved = None if statistics is None else statistics.moved(basis.second_moments)
        return PreparedWeight(name, basis.encode(matrix), moved, basis)

    def solve(self, prepared: PreparedWeight, grid: Grid) -> QuantizedWeight:
        """As `solve_each`, for the matrix of one layer."""
        (rounded,) = self.solve_each(prepared, grid)
        return rounded

    def solve_part(self, prepared: PreparedWeight, grid: Grid) -> QuantizedWeight:
        """As `solve`, for one of several matrices that are stored as one, with one grid."""
        return self.solve(replace(prepared, shares_grid=True), grid)

    def solve_each(self, prepared: PreparedWeight, grid: Grid) -> list[QuantizedWeight]:
        """Rounds to a grid that was made for the matrix. Without statistics it rounds to nearest.

        Rows that already lie on the grid keep their numbers, even if the steps would correct earlier errors there.
        Returns one rounded weight for each layer of the matrix.
        """
        nearest = on_grid(prepared.matrix, grid)
        if nearest is not None and bool(nearest[0].all()):
            return _split(replace(nearest[1], basis=prepared.basis), prepared)
        done = self._solved(replace(prepared, grid=grid))
        assert done.rounded is not None, "the steps must include a solver"
        solved, factors = replace(done.rounded, basis=prepared.basis), done.low_rank
        if nearest is not None:
            solved = _with_rows(solved, *nearest)
            kept = prepared.by_layer(nearest[0])
            factors = tuple(own.without(rows) for own, rows in zip(factors, kept, strict=False))
        parts = _split(solved, prepared)
        if not factors:
            return parts
        return [replace(part, low_rank=own) for part, own in zip(parts, factors, strict=True)]

    def solve_rows(self, prepared: PreparedWeight, grid: MixedRowsGrid, places: Tensor) -> list[QuantizedWeight]:
        """As `solve_each`, for rows of several widths. `places` says which of the widths of `grid` each row has.

        The rows of a width are rounded together, on its integer grid. Rows are independent for every solver and step on
        layers, so each gets what it would get in a layer of its own width.
        """
        parts = []
        for place, kind in enumerate(grid.kinds):
            index = (places == place).nonzero()[:, 0]
            if len(index):
                rows = replace(prepared, matrix=prepared.matrix[index], rows=())
                parts.append((index, self.solve(rows, kind)))
        return _split(grid.joined(parts), prepared)

    def _solved(self, prepared: PreparedWeight) -> PreparedWeight:
        warn = partial(_warn_about, self.warn, prepared.name)
        steps = self._steps_for(prepared, warn)
        for step in steps:
            if step.when == When.SOLVER:
                for other in steps:
                    prepared = other.before_solver(prepared, warn)
            prepared = step.apply(prepared, warn)
        return prepared

    def _steps_for(self, prepared: PreparedWeight, warn: Warn) -> Sequence[RoundingStep]:
        """The steps for a matrix. Those that need statistics cannot run if no token reached the matrix."""
        if prepared.statistics is not None:
            return self.steps
        if any(step.needs_statistics for step in self.steps if step.when >= When.SOLVER):
            warn(f"{_NOT_REACHED}; it is rounded to nearest. calibration.all_experts=true sends it every token")
            return [Solver.registry["rtn"](name="rtn")]
        return [step for step in self.steps if not step.needs_statistics]


def _split(solved: QuantizedWeight, prepared: PreparedWeight) -> list[QuantizedWeight]:
    """The rounded weight of each layer of a matrix."""
    if not prepared.rows:
        return [solved]
    pieces = (prepared.by_layer(part) for part in (solved.codes, solved.params.scale, solved.params.zero))
    return [
        replace(solved, codes=codes.contiguous(), params=GroupParams(scale.contiguous(), zero.contiguous()))
        for codes, scale, zero in zip(*pieces, strict=True)
    ]


def _with_rows(solved: QuantizedWeight, rows: Tensor, other: QuantizedWeight) -> QuantizedWeight:
    """A rounded matrix with some `rows`, bool of shape (out,), taken from another one."""
    codes = torch.where(rows[:, None], other.codes, solved.codes)
    chosen = rows[:, None, None]
    scale = torch.where(chosen, other.params.scale, solved.params.scale)
    zero = torch.where(chosen, other.params.zero, solved.params.zero)
    return replace(solved, codes=codes, params=GroupParams(scale, zero))


def is_ignored(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name matches one of the patterns.

    A pattern is a whole name, the part of a name after a dot, or a regular expression that starts with ``re:``.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.search(pattern[3:], module):
                return True
        elif module == pattern or module.endswith(f".{pattern}"):
            return True
    return False


_NOT_REACHED = "no calibration token reached this expert"
HEAD = "lm_head"
"""The usual name of the head, which recipes do not round by default."""


def _check_patterns(patterns: Iterable[str], linears: Iterable[LinearOp], where: str, model: str) -> None:
    """Raises RecipeError for a pattern that is not a regular expression or matches no layer."""
    linears = list(linears)
    for pattern in patterns:
        try:
            used = any(is_ignored(op.name, [pattern]) for op in linears)
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
        if not used and pattern != HEAD:  # a model may have no head of that name, and its head is not rounded
            raise RecipeError(f"{where}: {pattern!r} matches no layer of this {model}")


def is_head(op: LinearOp) -> bool:
    """Whether a layer writes logits."""
    return op.entry.writes == "logits"


def find_targets(
    graph: ModelGraph,
    grid_of: Callable[[str], Grid],
    ignore: tuple[str, ...],
    overridden: Sequence[tuple[str, ...]] = (),
    basis: WeightBasis | None = None,
    heads: bool = False,
) -> dict[str, LinearOp]:
    """The layers to round, by the name of their weight. `grid_of` returns the grid of a layer, given the layer's name.

    With `heads`, layers that write logits are rounded whatever `ignore` says.

    Raises RecipeError if a pattern in `ignore` or `overridden` is not a valid regular expression or matches no layer,
    if a group size does not fit, and if no layer is left to round.
    """
    linears = graph.linears
    _check_patterns(ignore, linears, "weights.ignore", graph.config.model_type)
    for i, patterns in enumerate(overridden):
        _check_patterns(patterns, linears, f"weights.overrides.{i}.layers", graph.config.model_type)
    head = HEAD in ignore  # models have other names for it
    targets = {
        op.weight: op
        for op in linears
        if op.entry.quantize
        and ((heads and is_head(op)) or not (is_ignored(op.name, ignore) or (head and is_head(op))))
    }
    if not targets:
        raise RecipeError("weights.ignore leaves no layer to round: shorten it")
    for op in targets.values():
        name, columns = op.name, op.in_features
        columns = columns if basis is None else basis.order(columns, name)
        grid_of(name).for_columns(columns).check_shape(op.out_features, columns, name)
    return targets


@dataclass(frozen=True)
class LayerGroup:
    """The layers of one group that are rounded.

    - `group`: a block, or the operations outside the blocks.
    - `targets`: the layers to round, by the name of their weight.
    - `tensors`: the folded parameters of the group.
    - `observed`: the second moments of the layers' inputs.
    - `online`: the online operations of the group.
    - `rounding_errors`: what rounding changes in the layers' inputs, by the inputs' keys.
    - `kronecker`: the factors of every group of a layer's outputs (`guided.kronecker`), by the name of its weight.
    """

    group: Group
    targets: Mapping[str, LinearOp]
    tensors: Mapping[str, Tensor]
    observed: dict[Key, SecondMoments]
    online: Sequence[OnlineOp]
    rounding_errors: Mapping[str, RoundingErrors] = field(default_factory=dict)
    kronecker: Mapping[str, Sequence[KroneckerFactors]] = field(default_factory=dict)

    def by_shared_input(self) -> dict[str, list[LinearOp]]:
        """As the function `by_shared_input`."""
        return by_shared_input(self.group, self.targets, self.online)

    def matrix(self, op: LinearOp) -> Tensor:
        """The weight of a layer that is not stacked, shape (out, in), fp32."""
        return op.to_matrix(self.tensors[op.weight].float())

    def experts(self, op: LinearOp) -> list[Tensor]:
        """The weights of stacked experts, each of shape (out, in), fp32."""
        return [op.to_matrix(stored) for stored in self.tensors[op.weight].float()]

    def statistics(self, key: str, expert: int | None = None) -> InputStatistics | None:
        """The statistics of an input; None if it was not observed.

        Each call makes a new object, because keeping those of all experts would take much memory.
        """
        moments = self.observed.get((key, expert))
        if moments is None or key not in self.rounding_errors:
            return None if moments is None else _statistics(moments)
        errors = self.rounding_errors[key]
        cross, squares = errors.cross, errors.second_moments
        return replace(_statistics(moments), rounding_error_cross=cross, rounding_error_second_moments=squares)

    def guided(self, key: str, op: LinearOp) -> list[InputStatistics]:
        """The statistics for each group of a layer's outputs (`weights.guided`); empty without them."""
        moments, pairs = self.observed.get((key, None)), self.kronecker.get(op.weight, ())
        if moments is not None and pairs and pairs[0].inputs is not None:
            return [pair.statistics(moments.count) for pair in pairs]
        parts = moments.parts.get(op.weight, []) if isinstance(moments, GuidedSecondMoments) else []
        found = [_statistics(own) for own in parts]
        if not pairs:
            return found
        return [replace(own, gradient_moments=pair.outputs) for own, pair in zip(found, pairs, strict=True)]

    def forget(self, key: str) -> None:
        """Drops the statistics of an input, those of all its experts included."""
        for observed_key in [observed_key for observed_key in self.observed if observed_key[0] == key]:
            del self.observed[observed_key]


def _statistics(moments: SecondMoments) -> InputStatistics:
    return InputStatistics(
        moments.second_moments, moments.count, moments.input_error_cross, moments.input_error_second_moments
    )


def round_layers(layers: LayerGroup, config: RoundingConfig) -> dict[str, RoundedLayer]:
    """Rounds the targets. The result has them by the name of their weight."""
    rounded: dict[str, RoundedLayer] = {}
    for key, ops in layers.by_shared_input().items():
        if ops[0].entry.stacked:
            rounded |= {op.weight: RoundedLayer(op, _round_experts(layers, op, key, config)) for op in ops}
            continue
        for grid in dict.fromkeys(config.grid_of(op).model_dump_json() for op in ops):
            same_grid = [op for op in ops if config.grid_of(op).model_dump_json() == grid]
            weights = _round_together(layers, same_grid, key, config)
            rounded |= {op.weight: RoundedLayer(op, weight) for op, weight in zip(same_grid, weights, strict=True)}
    return rounded


def by_shared_input(
    group: Group, targets: Mapping[str, LinearOp], online: Sequence[OnlineOp]
) -> dict[str, list[LinearOp]]:
    """The targets of a group, by the input that they read. Layers with the same input are rounded together."""
    readers: dict[str, list[LinearOp]] = defaultdict(list)
    own = modules_with_own_map(online)
    for op in group.linears:
        if op.weight in targets:
            readers[input_key(op, own)].append(op)
    return readers


def _warn_about(warn: Warn, name: str, text: str) -> None:
    warn(f"{name}: {text}")


def _round_together(layers: LayerGroup, ops: list[LinearOp], key: str, config: RoundingConfig) -> list[QuantizedWeight]:
    matrices = [layers.matrix(op) for op in ops]
    if layers.guided(key, ops[0]):
        grid = config.grid_of(ops[0]).with_tensor_scale(torch.cat(matrices))
        return [
            _round_guided(op, matrix, layers.guided(key, op), grid, config)
            for op, matrix in zip(ops, matrices, strict=True)
        ]
    if config.grid_of(ops[0]).has_codebooks:  # which are stored with each layer: each has its own
        return [
            _round_alone(op, matrix, layers.statistics(key), config) for op, matrix in zip(ops, matrices, strict=True)
        ]
    names = ", ".join(op.module for op in ops)
    prepared = config.prepare(names, torch.cat(matrices), layers.statistics(key))
    prepared = replace(prepared, rows=tuple(len(matrix) for matrix in matrices))
    grid = config.grid_of(ops[0]).with_tensor_scale(prepared.matrix)
    if isinstance(grid, MixedRowsGrid):
        return config.solve_rows(prepared, grid, torch.cat([config.row_places[op.weight] for op in ops]))
    return config.solve_each(prepared, grid)


def _round_alone(
    op: LinearOp, matrix: Tensor, statistics: InputStatistics | None, config: RoundingConfig
) -> QuantizedWeight:
    prepared = config.prepare(op.module, matrix, statistics)
    return config.solve(prepared, config.grid_of(op).with_tensor_scale(prepared.matrix))


def _round_guided(
    op: LinearOp, matrix: Tensor, statistics: Sequence[InputStatistics], grid: Grid, config: RoundingConfig
) -> QuantizedWeight:
    """Rounds groups of rows, each with statistics of its own. `GuidedSecondMoments` splits rows in the same way."""
    split = zip(matrix.tensor_split(len(statistics)), statistics, strict=True)
    parts = [config.prepare(op.module, rows, own) for rows, own in split]
    if isinstance(grid, MixedRowsGrid):
        places = config.row_places[op.weight].tensor_split(len(parts))
        return joined([config.solve_rows(part, grid, own)[0] for part, own in zip(parts, places, strict=True)])
    return joined([config.solve_part(part, grid) for part in parts])


def _round_experts(layers: LayerGroup, op: LinearOp, key: str, config: RoundingConfig) -> QuantizedWeight:
    matrices = layers.experts(op)
    encoded = (config.encoded(matrix, layers.statistics(key, expert)) for expert, matrix in enumerate(matrices))
    grid = config.grid_of(op).with_tensor_scale(*encoded)
    weights: list[QuantizedWeight] = []
    for expert, matrix in enumerate(matrices):
        prepared = config.prepare(f"{op.weight}[{expert}]", matrix, layers.statistics(key, expert))
        weights.append(config.solve_part(prepared, grid))
    scales, zeros = (torch.cat([getattr(w.params, part) for w in weights]) for part in ("scale", "zero"))
    return QuantizedWeight(
        grid, torch.cat([w.codes for w in weights]), GroupParams(scales, zeros), _stacked_basis(weights)
    )


def _stacked_basis(weights: Sequence[QuantizedWeight]) -> Basis | None:
    """The bases of several matrices, as one basis of the matrix with all their rows."""
    bases = [weight.basis for weight in weights if weight.basis is not None]
    scales = [basis.scale for basis in bases if basis.scale is not None]
    return replace(bases[0], scale=torch.cat(scales) if scales else None) if bases else None
