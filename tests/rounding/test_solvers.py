"""The contract of rounding solvers, for every one that is registered, and what is special about some."""

from typing import Any

import pytest
import torch

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Grid, IntegerGrid
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import InputStatistics, Solver, output_error
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.solvers.gptaq import Gptaq
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.qronos import Qronos
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing import parametrize_with_checks
from gyroquant.testing.grids import columns_for
from gyroquant.testing.solvers import grids, problem

GRIDS = grids()
CALIBRATED = [
    solver
    for kind in Solver.registry.values()
    for solver in kind.examples()
    if kind.needs_statistics and not kind.needs_model
]


@parametrize_with_checks(Solver.registry)
def test_every_solver_keeps_its_contract(instance: Solver, check: Any) -> None:
    check(instance)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("solver", CALIBRATED, ids=str)
def test_calibrated_solvers_beat_round_to_nearest_by_far(solver: Solver, grid: Grid) -> None:
    if grid.tile_columns > 1 and getattr(solver, "act_order", False):
        assert "codes neighbouring columns together" in solver.conflicts((), [grid])
        return
    weight, statistics = problem(columns=columns_for(grid))
    grid = grid.with_tensor_scale(weight)
    calibrated = output_error(weight, solver.solve(weight, grid, statistics).dequantize(), statistics)
    nearest = output_error(weight, RoundToNearest().solve(weight, grid).dequantize(), statistics)
    assert calibrated < 0.75 * nearest


def test_gptq_equals_the_definition() -> None:
    """One column after another with the explicit inverse, as in the paper's equations 2 and 3."""
    weight, statistics = problem(rows=6, columns=32)
    grid = IntegerGrid(bits=3, group_size=16, scale="minmax")
    h = statistics.second_moments.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(32, dtype=h.dtype)
    free, codes = weight.double().clone(), torch.empty(6, 32, dtype=torch.uint8)
    for i in range(32):
        if i % 16 == 0:
            params = grid.fit(free[:, None, i : i + 16].float())
        codes[:, i] = grid.encode(free[:, i, None].float(), params[:, 0])[:, 0]
        error = free[:, i] - grid.decode(codes[:, i, None], params[:, 0])[:, 0]
        inverse = torch.linalg.inv(h[i:, i:])
        free[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    assert torch.equal(Gptq().solve(weight, grid, statistics).codes, codes)


def test_gptq_is_ldlq() -> None:
    """QuIP (arXiv 2307.13304), section 3.1: the errors of all earlier columns, times a column of the factor of
    ``H = (A + I) D (A + I)^T``, with A strictly upper triangular. Theirs is GPTQ with scales that are fixed before.
    """
    weight, statistics = problem(rows=6, columns=32)
    grid = IntegerGrid(bits=2, group_size=16)
    h = statistics.second_moments.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(32, dtype=h.dtype)
    upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # h = upper @ upper.T
    feedback = upper / upper.diagonal() - torch.eye(32)
    w, q = weight.double(), torch.zeros(6, 32, dtype=torch.float64)
    params = grid.fit(weight.view(6, 2, 16))
    for k in range(32):
        wanted = w[:, k] + (w - q)[:, :k] @ feedback[:k, k]
        group = params[:, k // 16]
        q[:, k] = grid.decode(grid.encode(wanted[:, None].float(), group), group)[:, 0].double()
    solved = Gptq(static_groups=True).solve(weight, grid, statistics)
    assert torch.equal(solved.dequantize(), q.float())


@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 192])
def test_groups_of_any_size_are_fitted_on_updated_weights(size: int) -> None:
    """The block of lazy updates must not show: one block and many give the same codes."""
    from gyroquant.rounding.solvers import gptq

    weight, statistics = problem()
    grid = IntegerGrid(bits=2, group_size=size)
    wanted = Gptq().solve(weight, grid, statistics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "_BLOCK", 10**6)
        single = Gptq().solve(weight, grid, statistics)
    assert (wanted.codes == single.codes).float().mean() > 0.995


def test_indefinite_moments_raise_the_damping_with_a_warning() -> None:
    weight, statistics = problem()
    broken = statistics.second_moments.clone()
    broken -= 0.05 * broken.diagonal().mean() * torch.eye(192)
    warnings: list[str] = []
    rounded = Gptq().solve(weight, IntegerGrid(bits=2, group_size=64), InputStatistics(broken, 2000), warnings.append)
    assert rounded.dequantize().isfinite().all()
    assert warnings
    assert "damping is raised to 0.1" in warnings[0]


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_moments_that_are_not_finite_are_an_error(broken: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        inverse_factor(torch.full((4, 4), broken), 0.01)
    with pytest.raises(InputError, match="not finite"):
        Qronos().solve(
            torch.ones(2, 64), IntegerGrid(bits=2, group_size=64), InputStatistics(torch.full((64, 64), broken), 1)
        )


@pytest.mark.parametrize("solver", [Gptq(), Gptaq(), Qronos()], ids=["gptq", "gptaq", "qronos"])
def test_calibrated_solvers_without_text_are_an_error(solver: Solver) -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        solver.solve(problem()[0], IntegerGrid(bits=2, group_size=64), None)


@pytest.mark.parametrize("name", ["gptq", "qronos", "gptaq"])
def test_act_order_needs_static_groups(name: str) -> None:
    with pytest.raises(RecipeError, match="static_groups"):
        load_recipe(name, ["weights.solver.act_order=true", "weights.solver.static_groups=false"])
