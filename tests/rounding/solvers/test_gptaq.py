"""GPTAQ against its definition: each column's error and drift spread over those behind it by explicit inverses."""

import pytest
import torch
from paired_problem import Problem

from gyroquant.grids import IntegerGrid
from gyroquant.rounding import InputStatistics
from gyroquant.rounding.solvers.gptaq import Gptaq
from gyroquant.rounding.solvers.gptq import Gptq


def defined(problem: Problem, grid: IntegerGrid, alpha: float) -> torch.Tensor:
    """The codes by the paper's update of the columns still free, with what a column leaves undone in both halves."""
    h = problem.statistics.second_moments.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    input_error_cross = alpha * problem.statistics.input_error_cross.double()
    free, columns = problem.weight.double().clone(), len(h)
    size, codes = grid.group_of(columns), torch.empty(problem.weight.shape, dtype=torch.uint8)
    for q in range(columns):
        if q % size == 0:
            params = grid.fit(free[:, q : q + size].float())
        codes[:, q] = grid.encode(free[:, q, None].float(), params)[:, 0]
        error = free[:, q] - grid.decode(codes[:, q, None], params)[:, 0]
        if q + 1 < columns:
            missing = torch.outer(error, h[q, q + 1 :]) + torch.outer(free[:, q], input_error_cross[q, q + 1 :])
            free[:, q + 1 :] += missing @ torch.linalg.inv(h[q + 1 :, q + 1 :])
    return codes


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_definition(bits: int, alpha: float) -> None:
    problem, grid = Problem(), IntegerGrid(bits=bits, group_size=16)
    solved = Gptaq(alpha=alpha).solve(problem.weight, grid, problem.statistics)
    assert torch.equal(solved.codes, defined(problem, grid, alpha))


def test_the_correction_is_made_across_lazy_blocks() -> None:
    problem, grid = Problem(columns=256, tokens=600), IntegerGrid(bits=3, group_size=64)
    solved = Gptaq(alpha=1).solve(problem.weight, grid, problem.statistics)
    assert (solved.codes == defined(problem, grid, 1.0)).float().mean() > 0.995


def test_without_drift_it_is_gptq() -> None:
    problem, grid = Problem(), IntegerGrid(bits=3, group_size=16)
    plain = InputStatistics(problem.statistics.second_moments, problem.statistics.count)
    for statistics in (
        plain,
        InputStatistics(plain.second_moments, plain.count, torch.zeros_like(plain.second_moments)),
    ):
        solved = Gptaq(alpha=1).solve(problem.weight, grid, statistics)
        assert torch.equal(solved.codes, Gptq().solve(problem.weight, grid, plain).codes)


def test_it_comes_nearer_to_what_the_unrounded_model_gave() -> None:
    problem, grid = Problem(rows=32, columns=64, tokens=1000, noise=0.6), IntegerGrid(bits=4, group_size=32)
    ours = Gptaq(alpha=1).solve(problem.weight, grid, problem.statistics).dequantize()
    gptq = Gptq().solve(problem.weight, grid, problem.statistics).dequantize()
    assert problem.error(ours) < 0.9 * problem.error(gptq)
