"""Refinement: never worse, stored exactly, at a point where no single number can be bettered, and told by recipes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paired_problem import Problem

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import InputStatistics, Refine, output_error
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.grids import columns_for
from gyroquant.testing.solvers import grids, problem

GRIDS = grids()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_betters_every_solver_on_every_grid_and_is_stored_exactly(grid: Grid) -> None:
    weight, statistics = problem(columns=columns_for(grid))
    grid = grid.with_tensor_scale(weight)
    for solver, share in ((RoundToNearest(), 0.6), (Gptq(), 0.995)):
        before = solver.solve(weight, grid, statistics)
        kept = before.dequantize().clone()
        after = Refine().run(weight, before, statistics)
        codes, params = grid.unpack(after.pack(), (48, columns_for(grid)))
        bound = grid.with_stored_scale(after.pack())
        assert torch.equal(QuantizedWeight(bound, codes, params).dequantize(), after.dequantize())
        gain = output_error(weight, after.dequantize(), statistics) / output_error(weight, kept, statistics)
        assert gain < share
        assert torch.equal(before.dequantize(), kept)


@given(st.integers(0, 10**6), st.integers(0, len(GRIDS) - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_it_never_makes_its_objective_worse(seed: int, number: int, scales: bool) -> None:
    """Towards the outputs of the unrounded model, with inputs that drifted."""
    made = Problem(seed, rows=max(4, GRIDS[number].tile_rows), columns=columns_for(GRIDS[number]), tokens=300)
    grid, statistics = GRIDS[number].with_tensor_scale(made.weight), made.statistics
    refine = Refine(passes=1, scales=scales, damp_percent=0)
    rounded = RoundToNearest().solve(made.weight, grid)
    error = made.error(rounded.dequantize())
    for _ in range(3):
        rounded = refine.run(made.weight, rounded, statistics)
        again = made.error(rounded.dequantize())
        assert again <= error * (1 + 1e-4)
        error = again


def test_at_the_end_no_code_can_be_bettered() -> None:
    weight, statistics = problem(rows=6, columns=64)
    grid = IntegerGrid(bits=2, group_size=64)
    end = Refine(passes=100, scales=False, damp_percent=0).run(
        weight, Gptq().solve(weight, grid, statistics), statistics
    )
    best = output_error(weight, end.dequantize(), statistics)
    for row in range(6):
        for column in range(0, 64, 7):
            for code in range(4):
                codes = end.codes.clone()
                codes[row, column] = code
                other = QuantizedWeight(grid, codes, end.params).dequantize()
                assert output_error(weight, other, statistics) >= best * (1 - 1e-5)


def test_inputs_never_seen_do_no_harm() -> None:
    weight, statistics = problem()
    dead = statistics.second_moments.clone()
    dead[:, 5] = dead[5, :] = 0
    for gram in (dead, torch.zeros_like(dead)):
        rounded = RoundToNearest().solve(weight, GRIDS[0].with_tensor_scale(weight))
        refined = Refine().run(weight, rounded, InputStatistics(gram, 1))
        assert refined.dequantize().isfinite().all()


def test_a_recipe_asks_for_it() -> None:
    recipe = load_recipe("rtn", ["weights.refine={passes: 2, scales: false}"])
    assert recipe.weights.refine == Refine(passes=2, scales=False)
    assert recipe.weights.needs_statistics
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe("gptq").weights.refine is None
    with pytest.raises(RecipeError, match="did you mean 'passes'"):
        load_recipe("gptq", ["weights.refine={pases: 2}"])
