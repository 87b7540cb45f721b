"""Rounding the linear layers of one block: layers that read the same input are solved together, experts one by one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from gyroquant.calibration.observers import Gram, Key, input_key, modules_with_own_map
from gyroquant.errors import RecipeError
from gyroquant.grids import Basis, Grid, GroupParams, QuantizedWeight
from gyroquant.models.graph import Group, LinearOp, ModelGraph
from gyroquant.models.online import Attachment
from gyroquant.models.packed import as_matrix
from gyroquant.rounding.base import InputStatistics, Solver, Warn
from gyroquant.rounding.basis import WeightBasis
from gyroquant.rounding.refine import Refine
from gyroquant.rounding.rtn import on_grid
from gyroquant.rounding.target import Target


@dataclass(frozen=True)
class Placed:
    """A matrix in the basis in which it is rounded, with the second moments of its input there."""

    name: str
    matrix: Tensor
    statistics: InputStatistics | None
    basis: Basis | None


@dataclass(frozen=True)
class Rounding:
    """How layers are rounded: `solver` to `grid`, in a `basis` of their inputs or as they are, towards a `target`."""

    solver: Solver
    grid: Grid
    basis: WeightBasis | None
    warn: Warn
    refine: Refine | None = None
    target: Target | None = None
    others: Mapping[str, Grid] = field(default_factory=dict)

    def grid_of(self, op: LinearOp) -> Grid:
        """The grid of a layer: `grid`, or that of its weight's name among `others`."""
        return self.others.get(op.weight, self.grid)

    def _basis(self, matrix: Tensor, statistics: InputStatistics | None) -> Basis | None:
        gram = None if statistics is None else statistics.gram
        return None if self.basis is None else self.basis.fit(matrix.shape[1], gram)

    def encoded(self, matrix: Tensor, statistics: InputStatistics | None) -> Tensor:
        """A matrix of shape (out, in), fp32, in the basis in which it will be rounded."""
        basis = self._basis(matrix, statistics)
        return matrix if basis is None else basis.encode(matrix)

    def place(self, name: str, matrix: Tensor, statistics: InputStatistics | None) -> Placed:
        """A matrix of shape (out, in), fp32, as it will be rounded."""
        basis = self._basis(matrix, statistics)
        if basis is None:
            return Placed(name, matrix, statistics, None)
        if statistics is None and basis.scale is not None:
            self.warn(f"{name}: no calibration token reached this expert; its basis is not scaled")
        there = None if statistics is None else statistics.moved(basis.second_moments)
        return Placed(name, basis.encode(matrix), there, basis)

    def solve(self, placed: Placed, grid: Grid) -> QuantizedWeight:
        """Rounds to a grid that is made for the matrix; without statistics, to nearest. Rows that lie on the grid
        already stay what they are, whatever the solver would make up for.
        """
        there = on_grid(placed.matrix, grid)
        if there is not None and bool(there[0].all()):
            return replace(there[1], basis=placed.basis)
        solved = self._solved(placed, grid)
        return solved if there is None else _with_rows(solved, *there)

    def _solved(self, placed: Placed, grid: Grid) -> QuantizedWeight:
        solver, warn = self.solver, partial(_named, self.warn, placed.name)
        if placed.statistics is None and (solver.needs_statistics or self.refine is not None):
            warn("no calibration token reached this expert; it is rounded to nearest")
            solver = Solver.kinds["rtn"](name="rtn")
        matrix, statistics = placed.matrix, placed.statistics
        if self.target is not None and statistics is not None:
            matrix, statistics = self.target.shifted(matrix, statistics, warn)
        solved = solver.solve(matrix, grid, statistics, warn)
        if self.refine is not None and statistics is not None:
            solved = self.refine.run(matrix, solved, statistics)
        return replace(solved, basis=placed.basis)


def _with_rows(solved: QuantizedWeight, rows: Tensor, other: QuantizedWeight) -> QuantizedWeight:
    """A rounded matrix with some rows of another one."""
    codes = torch.where(rows[:, None], other.codes, solved.codes)
    chosen = rows[:, None, None]
    scale = torch.where(chosen, other.params.scale, solved.params.scale)
    zero = torch.where(chosen, other.params.zero, solved.params.zero)
    return replace(solved, codes=codes, params=GroupParams(scale, zero))


def is_ignored(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is one of the patterns, ends in one behind a dot, or matches one behind ``re:``."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.search(pattern[3:], module):
                return True
        elif module == pattern or module.endswith(f".{pattern}"):
            return True
    return False


def _check_patterns(patterns: Iterable[str], linears: Iterable[LinearOp], where: str, model: str) -> None:
    """Raises RecipeError for a pattern that is not a regular expression or matches no layer."""
    linears = list(linears)
    for pattern in patterns:
        try:
            used = any(is_ignored(layer_name(op), [pattern]) for op in linears)
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
        if not used:
            raise RecipeError(f"{where}: {pattern!r} matches no layer of this {model}")


def find_targets(
    graph: ModelGraph,
    grid_of: Callable[[str], Grid],
    ignore: tuple[str, ...],
    overridden: Sequence[tuple[str, ...]] = (),
    basis: WeightBasis | None = None,
) -> dict[str, LinearOp]:
    """The layers to round, by the name of their weight; `grid_of` says the grid of a layer by its own name.

    Raises RecipeError for a pattern, among those to `ignore` or `overridden`, that is not a regular expression or
    matches nothing, a group size that does not fit, or when nothing is left to round.
    """
    linears = [op for group in (*graph.blocks, graph.outer) for op in group.linears]
    _check_patterns(ignore, linears, "weights.ignore", graph.config.model_type)
    for i, patterns in enumerate(overridden):
        _check_patterns(patterns, linears, f"weights.overrides.{i}.layers", graph.config.model_type)
    targets = {op.weight: op for op in linears if op.entry.quantize and not is_ignored(layer_name(op), ignore)}
    if not targets:
        raise RecipeError("weights.ignore leaves no layer to round")
    for op in targets.values():
        name, columns = layer_name(op), op.in_features
        grid_of(name).group_of(columns if basis is None else basis.order(columns, name), name)
    return targets


def layer_name(op: LinearOp) -> str:
    """The name by which recipes and reports speak of a layer."""
    return op.weight if op.entry.stacked else op.module


@dataclass(frozen=True)
class Part:
    """Layers of one group: `targets` to round, their folded weights, and what was observed of their inputs, with what
    runs `online`.
    """

    group: Group
    targets: Mapping[str, LinearOp]
    tensors: Mapping[str, Tensor]
    observed: Mapping[Key, Gram]
    online: Sequence[Attachment]

    def together(self) -> dict[str, list[LinearOp]]:
        """As `together`."""
        return together(self.group, self.targets, self.online)

    def matrix(self, op: LinearOp) -> Tensor:
        """The weight of a layer that is not stacked, shape (out, in), fp32."""
        return as_matrix(self.tensors[op.weight].float(), op)

    def experts(self, op: LinearOp) -> list[Tensor]:
        """The weights of stacked experts, each of shape (out, in), fp32."""
        return [as_matrix(stored, op) for stored in self.tensors[op.weight].float()]

    def statistics(self, key: str, expert: int | None = None) -> InputStatistics | None:
        """What was observed of an input, made anew each time: those of all experts are large."""
        gram = self.observed.get((key, expert))
        return None if gram is None else InputStatistics(gram.gram, gram.count, gram.drift, gram.spread)


def round_part(part: Part, how: Rounding) -> dict[str, QuantizedWeight]:
    """Rounds the targets; returns them by name."""
    done: dict[str, QuantizedWeight] = {}
    for key, ops in part.together().items():
        if ops[0].entry.stacked:
            done |= {op.weight: _round_experts(part, op, key, how) for op in ops}
            continue
        for grid in dict.fromkeys(how.grid_of(op).model_dump_json() for op in ops):
            alike = [op for op in ops if how.grid_of(op).model_dump_json() == grid]
            pieces = _round_together(part, alike, key, how)
            done |= {op.weight: weight for op, weight in zip(alike, pieces, strict=True)}
    return done


def together(group: Group, targets: Mapping[str, LinearOp], online: Sequence[Attachment]) -> dict[str, list[LinearOp]]:
    """The targets of a group by what they read: those that read the same are rounded together."""
    found: dict[str, list[LinearOp]] = defaultdict(list)
    own = modules_with_own_map(online)
    for op in group.linears:
        if op.weight in targets:
            found[input_key(op, own)].append(op)
    return found


def _named(warn: Warn, name: str, text: str) -> None:
    warn(f"{name}: {text}")


def _round_together(part: Part, ops: list[LinearOp], key: str, how: Rounding) -> list[QuantizedWeight]:
    matrices = [part.matrix(op) for op in ops]
    names = ", ".join(op.module for op in ops)
    placed = how.place(names, torch.cat(matrices), part.statistics(key))
    solved = how.solve(placed, how.grid_of(ops[0]).bind(placed.matrix))
    sizes = [len(matrix) for matrix in matrices]
    parts = zip(
        solved.codes.split(sizes), solved.params.scale.split(sizes), solved.params.zero.split(sizes), strict=True
    )
    return [
        QuantizedWeight(
            solved.grid, codes.contiguous(), GroupParams(scale.contiguous(), zero.contiguous()), solved.basis
        )
        for codes, scale, zero in parts
    ]


def _round_experts(part: Part, op: LinearOp, key: str, how: Rounding) -> QuantizedWeight:
    matrices = part.experts(op)
    encoded = (how.encoded(matrix, part.statistics(key, expert)) for expert, matrix in enumerate(matrices))
    grid = how.grid_of(op).bind(*encoded)
    weights: list[QuantizedWeight] = []
    for expert, matrix in enumerate(matrices):
        placed = how.place(f"{op.weight}[{expert}]", matrix, part.statistics(key, expert))
        weights.append(how.solve(placed, grid))
    params = GroupParams(torch.cat([w.params.scale for w in weights]), torch.cat([w.params.zero for w in weights]))
    return QuantizedWeight(grid, torch.cat([w.codes for w in weights]), params, _stacked(weights))


def _stacked(weights: Sequence[QuantizedWeight]) -> Basis | None:
    """The bases of several matrices as that of the matrix of all their rows."""
    bases = [weight.basis for weight in weights if weight.basis is not None]
    scales = [basis.scale for basis in bases if basis.scale is not None]
    return replace(bases[0], scale=torch.cat(scales) if scales else None) if bases else None
