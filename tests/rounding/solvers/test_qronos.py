"""Qronos against its definition: Algorithm 1 of the paper, each least-squares problem solved anew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paired_problem import Problem

from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.rounding import InputStatistics
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.qronos import Qronos, largest_eigenvalue, starting_point

GRIDS = [
    IntegerGrid(bits=2, group_size=16),
    IntegerGrid(bits=3, group_size=-1, scale="minmax"),
    IntegerGrid(bits=4, group_size=32, symmetric=True),
]


def damped(problem: Problem, solver: Qronos) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs with the rows that stand for the damping."""
    gram = problem.statistics.second_moments
    root = (solver.damping(gram) * gram.double().diagonal().mean()) ** 0.5
    extra = root * torch.eye(gram.shape[0], dtype=torch.float64)
    return torch.cat([problem.x, extra]), torch.cat([problem.y, extra])


def algorithm_1(problem: Problem, solver: Qronos, grid: Grid, like: QuantizedWeight) -> tuple[torch.Tensor, float]:
    """The codes that the paper's algorithm chooses among the numbers of `like`, and its nearest miss of a tie."""
    x, y = damped(problem, solver)
    target, now = x @ problem.weight.double().T, problem.weight.double().clone()
    codes = torch.empty(now.shape, dtype=torch.uint8)
    size, margin = grid.group_of(now.shape[1]), 1.0
    left = solver.order(problem.statistics.second_moments).tolist()
    while left:
        t = left.pop(0)
        others = [j for j in range(now.shape[1]) if j != t]
        residual = target - y[:, others] @ now[:, others].T
        best = y[:, t] @ residual / y[:, t].square().sum()
        params = like.params[:, t // size]
        numbers = grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8).expand(len(best), -1), params).double()
        distance, order = (numbers - best[:, None]).abs().sort(dim=1)
        codes[:, t], now[:, t] = order[:, 0], numbers.gather(1, order[:, :1])[:, 0]
        step = params.scale.double().abs()[:, 0]
        margin = min(margin, float(((distance[:, 1] - distance[:, 0]) / step).min()))
        if left:
            done = [j for j in range(now.shape[1]) if j not in left]
            now[:, left] = torch.linalg.lstsq(y[:, left], target - y[:, done] @ now[:, done].T).solution.T
    return codes, margin


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "solver", [Qronos(alpha=1e-3), Qronos(), Qronos(act_order=True)], ids=["1e-3", "1e-6", "order"]
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_qronos_is_algorithm_1(grid: IntegerGrid, solver: Qronos, seed: int) -> None:
    problem = Problem(seed)
    rounded = solver.solve(problem.weight, grid, problem.statistics)
    codes, margin = algorithm_1(problem, solver, grid, rounded)
    assert margin > 1e-5  # no tie that rounding errors could turn
    assert torch.equal(rounded.codes, codes)


@given(st.integers(0, 10**6), st.integers(1, 24), st.sampled_from([1e-6, 1e-3, 0.1]))
@settings(max_examples=30, deadline=None)
def test_the_start_is_the_optimum_given_its_first_column(seed: int, columns: int, alpha: float) -> None:
    problem, solver = Problem(seed, rows=3, columns=columns, tokens=200), Qronos(alpha=alpha)
    statistics = problem.statistics
    factor = inverse_factor(statistics.second_moments, solver.damping(statistics.second_moments))
    start = starting_point(problem.weight, statistics.input_error_cross, factor).double()
    x, y = damped(problem, solver)
    target, weight = x @ problem.weight.double().T, problem.weight.double()
    first = y[:, 0] @ (target - y[:, 1:] @ weight[:, 1:].T) / y[:, 0].square().sum()
    assert torch.allclose(start[:, 0], first, rtol=1e-4, atol=1e-4)
    rest = torch.linalg.lstsq(y[:, 1:], target - torch.outer(y[:, 0], first)).solution.T
    assert torch.allclose(y[:, 1:] @ start[:, 1:].T, y[:, 1:] @ rest.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_drift_qronos_is_gptq(grid: IntegerGrid, act_order: bool) -> None:
    """Code for code, whether no drift is known or it is zero."""
    problem = Problem(columns=96, rows=40, noise=0)
    problem.y = problem.x
    statistics, solver = problem.statistics, Qronos(alpha=1e-3, act_order=act_order)
    assert not statistics.input_error_cross.any()
    gptq = Gptq(act_order=act_order, damp_percent=solver.damping(statistics.second_moments))
    wanted = gptq.solve(problem.weight, grid, statistics).codes
    assert torch.equal(solver.solve(problem.weight, grid, statistics).codes, wanted)
    unknown = InputStatistics(statistics.second_moments, statistics.count)
    assert torch.equal(solver.solve(problem.weight, grid, unknown).codes, wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_qronos_beats_gptq_where_inputs_drift(grid: IntegerGrid, seed: int) -> None:
    problem = Problem(seed, rows=32, columns=64, tokens=1000)
    qronos = problem.error(Qronos().solve(problem.weight, grid, problem.statistics).dequantize())
    gptq = problem.error(Gptq().solve(problem.weight, grid, problem.statistics).dequantize())
    assert qronos < 0.9 * gptq
    if grid.bits == 4:  # better than even the unrounded weights are on such inputs
        assert qronos < problem.error(problem.weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_drifting_problems_keep_the_contract(act_order: bool) -> None:
    problem, grid = Problem(rows=40, columns=64), GRIDS[0]
    statistics, solver = problem.statistics, Qronos(act_order=act_order)
    before = problem.weight.clone(), statistics.input_error_cross.clone()
    rounded = solver.solve(problem.weight, grid, statistics)
    assert torch.equal(problem.weight, before[0])
    assert torch.equal(statistics.input_error_cross, before[1])
    assert torch.equal(rounded.codes, solver.solve(problem.weight, grid, statistics).codes)
    part = solver.solve(problem.weight[:15], grid, statistics)
    assert (rounded.codes[:15] == part.codes).float().mean() > 0.995  # products of other sizes round differently


@pytest.mark.parametrize("dead", [0, 5])
def test_inputs_that_have_died_leave_their_weights_alone(dead: int) -> None:
    """Also where the original model still had them: no weight behind a zero can make up for it, the others do."""
    problem = Problem(columns=32)
    problem.y[:, dead] = 0
    statistics = problem.statistics
    factor = inverse_factor(statistics.second_moments, 0.01)
    start = starting_point(problem.weight, statistics.input_error_cross, factor)
    assert torch.allclose(start[:, dead], problem.weight[:, dead], atol=1e-6)
    rounded = Qronos().solve(problem.weight, GRIDS[2], statistics).dequantize()
    assert rounded.isfinite().all()
    assert problem.error(rounded) < problem.error(Gptq().solve(problem.weight, GRIDS[2], statistics).dequantize())


def test_many_rows_are_corrected_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(rows=50)
    statistics = problem.statistics
    factor = inverse_factor(statistics.second_moments, 0.01)
    whole = starting_point(problem.weight, statistics.input_error_cross, factor)
    monkeypatch.setattr("gyroquant.rounding.solvers.qronos._ROWS", 16)
    assert torch.allclose(starting_point(problem.weight, statistics.input_error_cross, factor), whole, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_the_largest_eigenvalue_is_found_from_below(seed: int, columns: int) -> None:
    x = torch.randn(80, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 2, columns)
    exact = float(torch.linalg.eigvalsh(x.double().T @ x.double())[-1])
    assert 0.7 * exact < largest_eigenvalue(x.T @ x) < exact * (1 + 1e-5)
    assert largest_eigenvalue(torch.zeros(columns, columns)) == 0


def test_the_cross_moments_have_the_original_in_their_rows() -> None:
    problem = Problem()
    assert torch.allclose(problem.statistics.cross, (problem.x.T @ problem.y).float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(InputStatistics(torch.eye(3), 1).cross, torch.eye(3))
