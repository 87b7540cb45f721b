"""The contract of rounding solvers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.grids.error import weight_error
from gyroquant.rounding import InputStatistics, Solver, output_error
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.contract import Contract, refuses, require
from gyroquant.testing.grids import COLUMNS, columns_for

ROWS = 48
SOLVER: Contract[Solver] = Contract("solver", Solver)


def grids() -> list[Grid]:
    """The first example of every grid for weights; three of those that code weights singly, in several widths."""
    kinds = [kind.examples() for kind in Grid.registry.values() if not kind.real_zeros]
    return [grid for made in kinds for grid in made[: 3 if made[0].has_bit_widths and made[0].coded_singly else 1]]


def problem(rows: int = ROWS, columns: int = COLUMNS, tokens: int = 2000) -> tuple[Tensor, InputStatistics]:
    """A weight matrix and the statistics of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 * torch.logspace(0.5, -0.5, columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    weight = 0.1 * torch.randn(rows, columns, generator=generator)
    return weight, InputStatistics(x.T @ x, tokens)


_KEPT: list[tuple[Solver, dict[str, QuantizedWeight]]] = []  # of the solver that was checked last


def _solved(solver: Solver, grid: Grid, weight: Tensor, statistics: InputStatistics) -> QuantizedWeight:
    """The solution of a case. Checks of one solver share it."""
    if not _KEPT or _KEPT[0][0] is not solver:
        _KEPT[:] = [(solver, {})]
    known = _KEPT[0][1]
    if str(grid) not in known:
        known[str(grid)] = solver.solve(weight, grid, statistics)
    return known[str(grid)]


def _by_layer(solver: Solver) -> bool:
    return not solver.needs_model


def _calibrated(solver: Solver) -> bool:
    return _by_layer(solver) and solver.needs_statistics


def _cases(solver: Solver) -> Iterator[tuple[Grid, Tensor, InputStatistics]]:
    """A problem for every kind of grid that the solver rounds to. The grid is bound to the weight.

    The first example of a class of solvers gets all grids, and others one of each kind of coding: that is where their
    settings make a difference.
    """
    every, examples = grids(), []
    with suppress(NotImplementedError):
        examples = list(type(solver).examples())
    if examples and str(solver) != str(examples[0]):
        every = list({(grid.coded_singly, grid.super_block > 1): grid for grid in reversed(every)}.values())
    for grid in every:
        if solver.conflicts((), [grid]) or (solver.needs_single_codes and not grid.coded_singly):
            continue
        weight, statistics = problem(columns=columns_for(grid))
        yield grid.with_tensor_scale(weight), weight, statistics


@SOLVER.check(when=_by_layer)
def check_the_result_is_a_whole_matrix_on_the_grid(solver: Solver) -> None:
    """Every weight has a code and every group a scale. Packing keeps both, and the input does not change."""
    for grid, weight, statistics in _cases(solver):
        before = weight.clone()
        solved = solver.solve(weight, grid, statistics)
        require(torch.equal(weight, before), f"solve changes the weight that it is given (grid {grid.grid})")
        require(
            solved.codes.shape == weight.shape,
            f"codes have shape {tuple(solved.codes.shape)}, not {tuple(weight.shape)}",
        )
        groups = (ROWS, weight.shape[1] // grid.group_of(weight.shape[1]), 1)
        require(
            solved.params.scale.shape == groups, f"scales have shape {tuple(solved.params.scale.shape)}, not {groups}"
        )
        require(int(solved.codes.max()) < grid.code_count, f"some codes are not below {grid.code_count}")
        codes, params = grid.unpack(solved.pack(), (ROWS, weight.shape[1]))
        again = QuantizedWeight(grid, codes, params).dequantize()
        require(
            torch.equal(again, solved.dequantize()),
            f"packing changes the result on the grid {grid.grid}: take scales that fit or round_params returned",
        )


@SOLVER.check(when=_by_layer)
def check_it_is_deterministic(solver: Solver) -> None:
    """The same input gives the same result."""
    for grid, weight, statistics in _cases(solver):
        first, second = _solved(solver, grid, weight, statistics).codes, solver.solve(weight, grid, statistics).codes
        require(torch.equal(first, second), f"the same input gives another result the second time (grid {grid.grid})")


@SOLVER.check(when=_by_layer)
def check_rows_are_independent(solver: Solver) -> None:
    """Rows, or tiles of rows, are independent, so layers that read the same input may be solved together."""
    for grid, weight, statistics in _cases(solver):
        rows = 20 // grid.tile_rows * grid.tile_rows
        whole, part = _solved(solver, grid, weight, statistics), solver.solve(weight[:rows], grid, statistics)
        same = float((whole.codes[:rows] == part.codes).float().mean())  # products of other sizes round differently
        require(same > 0.999, f"{1 - same:.1%} of the codes of a row change with the other rows (grid {grid.grid})")


@SOLVER.check(when=_by_layer)
def check_weights_on_the_grid_stay(solver: Solver) -> None:
    """Weights that lie on the grid do not change, if rounding to nearest does not change them.

    Left out: grids that code weights together or have super-blocks. They do not find the scales of such weights again.
    """
    for grid, weight, statistics in _cases(solver):
        if not grid.coded_singly or grid.super_block > 1:
            continue
        plain = type(grid)(**grid.model_dump()).fitted_by("minmax")
        on_grid = RoundToNearest().solve(weight, plain.with_tensor_scale(weight)).dequantize()
        bound = plain.with_tensor_scale(on_grid)
        again, nearest = (by.solve(on_grid, bound, statistics).dequantize() for by in (solver, RoundToNearest()))
        error, limit = weight_error(on_grid, again), weight_error(on_grid, nearest) + 1e-6
        require(error < limit, f"weights on the grid {grid.grid} change by {error:.2g} of their squared size")


@SOLVER.check(when=_by_layer)
def check_inputs_never_seen_do_no_harm(solver: Solver) -> None:
    """A column whose input is always zero gets about the same error as with rounding to nearest."""
    for grid, weight, statistics in _cases(solver):
        dead = statistics.second_moments.clone()
        dead[:, 5] = dead[5, :] = 0
        solved = solver.solve(weight, grid, InputStatistics(dead, statistics.count)).dequantize()
        require(
            bool(solved.isfinite().all()), f"an input that is always zero makes weights not finite (grid {grid.grid})"
        )
        nearest = RoundToNearest().solve(weight, grid).dequantize()
        limit = 3 * (nearest[:, 5] - weight[:, 5]).norm() + 1e-3
        close = bool((solved[:, 5] - weight[:, 5]).norm() < limit)
        require(close, f"an input that is always zero gives its column a large error (grid {grid.grid})")


@SOLVER.check(when=_by_layer)
def check_no_input_at_all_rounds_to_nearest(solver: Solver) -> None:
    """With statistics of zero tokens, the result is that of rounding to nearest."""
    for grid, weight, _ in _cases(solver):
        solved = solver.solve(weight, grid, InputStatistics(torch.zeros(weight.shape[1], weight.shape[1]), 0))
        same = torch.equal(solved.codes, RoundToNearest().solve(weight, grid).codes)
        require(same, f"with statistics of zero tokens it does not round to nearest (grid {grid.grid})")


@SOLVER.check(when=_calibrated)
def check_statistics_make_it_better_than_rounding_to_nearest(solver: Solver) -> None:
    """A solver with `needs_statistics` has a smaller output error than rounding to nearest."""
    for grid, weight, statistics in _cases(solver):
        solved = output_error(weight, _solved(solver, grid, weight, statistics).dequantize(), statistics)
        nearest = output_error(weight, RoundToNearest().solve(weight, grid).dequantize(), statistics)
        require(
            solved < nearest,
            f"its output error on the grid {grid.grid} is {solved:.3g}, but rounding to nearest has {nearest:.3g}",
        )


@SOLVER.check(when=_calibrated)
def check_without_statistics_it_refuses(solver: Solver) -> None:
    """A solver with `needs_statistics` raises InputError without statistics."""
    weight, grid = problem()[0], grids()[0]
    refuses(
        lambda: solver.solve(weight, grid.with_tensor_scale(weight), None),
        InputError,
        "it declares needs_statistics, but solves without statistics.",
        "needs calibration text",
    )


@SOLVER.check(when=lambda solver: _by_layer(solver) and not solver.needs_statistics)
def check_it_solves_without_statistics(solver: Solver) -> None:
    """A solver without `needs_statistics` rounds without statistics."""
    weight, grid = problem()[0], grids()[0]
    try:
        solver.solve(weight, grid.with_tensor_scale(weight), None)
    except InputError as error:
        raise AssertionError(f"it does not solve without statistics ({error}). Set needs_statistics = True") from error


@SOLVER.check(when=lambda solver: not _by_layer(solver))
def check_it_is_whole_model_and_says_so(solver: Solver) -> None:
    """A solver of whole models refuses to round a single layer."""
    weight, grid = problem()[0], grids()[0]
    refuses(lambda: solver.solve(weight, grid, None), TypeError, "it rounds a single layer.", "whole models")


def check_solver(solver: Solver | type[Solver]) -> None:
    """Runs all checks of a solver, or of every example of a class of solvers, on every kind of grid.

    Raises AssertionError, which names the class, what is wrong and what to do.
    """
    SOLVER.run(solver)
