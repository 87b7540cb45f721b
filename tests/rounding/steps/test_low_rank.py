"""The low-rank branch of one layer: its factors are the best ones, and each place and metric does what it says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paired_problem import Problem
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids import IntegerGrid, LowRankFactors, QuantizedWeight
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import InputStatistics, LowRank, WeightBasis
from gyroquant.rounding.base import PreparedWeight
from gyroquant.rounding.layers import RoundingConfig
from gyroquant.rounding.solvers.rtn import RoundToNearest

GRID = IntegerGrid(bits=2, group_size=16)


def layer(seed: int, rows: int = 24, columns: int = 32, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Weights, and strongly correlated inputs, both fp32."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) * torch.logspace(0.5, -1, columns)
    return torch.randn(rows, columns, generator=draw), torch.randn(tokens, columns, generator=draw) @ mix


def moments(x: Tensor) -> InputStatistics:
    return InputStatistics(x.T @ x, len(x))


def rounded(weight: Tensor, statistics: InputStatistics | None, solver: str = "gptq", **branch: Any) -> QuantizedWeight:
    """A layer rounded to 2 bits, with a branch, or with none if nothing is said of it."""
    changes = {"low_rank": {"rank": 4, "damp_percent": 0.0} | branch} if branch else {}
    recipe: dict[str, Any] = {"weights": {"bits": 2, "group_size": 16, "solver": solver} | changes}
    if statistics is not None and statistics.rounding_error_cross is not None:
        recipe["activations"] = {"bits": 3}
    weights = load_recipe(recipe).weights
    config = RoundingConfig(weights.layer_steps, GRID, None, lambda text: None)
    return config.solve(config.prepare("layer", weight, statistics), GRID.with_tensor_scale(weight))


def error(weight: Tensor, made: Tensor, x: Tensor) -> float:
    """``|X (W - Q)^T|^2``."""
    return float((x.double() @ (weight.double() - made.double()).T).square().sum())


def nearest_with_branch(weight: Tensor, x: Tensor, rank: int) -> tuple[Tensor, LowRankFactors]:
    """The error of rounding a layer to nearest, and the branch for it."""
    solved = RoundToNearest().solve(weight, GRID)
    state = PreparedWeight("layer", weight, moments(x), None, GRID, solved)
    (factors,) = LowRank(rank=rank, damp_percent=0.0).apply(state).low_rank
    return weight - solved.dequantize(), factors


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 8), rows=st.sampled_from([8, 24, 40]))
def test_no_other_branch_of_that_rank_leaves_less_error(seed: int, rank: int, rows: int) -> None:
    """Not the best one by singular values of the error, not a random one, not one near to ours."""
    weight, x = layer(seed, rows)
    rest, factors = nearest_with_branch(weight, x, rank)
    ours = error(rest, factors.product(), x)
    u, s, v = torch.linalg.svd(rest.double(), full_matrices=False)
    draw = torch.Generator().manual_seed(seed + 1)
    left, right = (torch.randn(shape, generator=draw) for shape in ((rows, rank), (rank, 32)))
    left = torch.linalg.lstsq(x @ right.T, x @ rest.T).solution.T  # the best L for a random R
    others = [(u[:, :rank] * s[:rank]) @ v[:rank], left @ right]
    others.append((factors.left + 0.01 * torch.randn(rows, rank, generator=draw)) @ factors.right)
    fp16 = 1e-6 * error(rest, torch.zeros_like(rest), x)  # what storing the factors in fp16 may cost
    assert all(ours <= error(rest, other, x) * (1 + 1e-4) + fp16 for other in others)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 8))
def test_what_is_left_has_the_singular_values_after_the_rank(seed: int, rank: int) -> None:
    """The least possible error is the sum of the squared singular values of X (W - Q)^T from the rank on."""
    weight, x = layer(seed)
    rest, factors = nearest_with_branch(weight, x, rank)
    whole = torch.linalg.svdvals(x.double() @ rest.double().T).square()
    fp16 = 1e-6 * float(whole.sum())
    assert error(rest, factors.product(), x) == pytest.approx(float(whole[rank:].sum()), rel=2e-3, abs=fp16)


@pytest.mark.parametrize("seed", range(3))
def test_inside_and_after_lower_the_output_error(seed: int) -> None:
    weight, x = layer(seed)
    plain = error(weight, rounded(weight, moments(x)).dequantize(), x)
    after = error(weight, rounded(weight, moments(x), position="after").merged(), x)
    paper = error(weight, rounded(weight, moments(x), position="inside", metric="plain").merged(), x)
    refit = error(weight, rounded(weight, moments(x), position="inside").merged(), x)
    assert after < 0.8 * plain
    assert paper < 0.8 * plain
    assert refit <= paper * (1 + 1e-4)


def test_inside_the_solver_does_not_see_the_directions_of_the_branch() -> None:
    """R are the first directions of the inputs. What is left of the error lies in the others."""
    weight, x = layer(1)
    made = rounded(weight, moments(x), position="inside", metric="plain")
    assert made.low_rank is not None
    directions = torch.linalg.svd(x.double(), full_matrices=False)[2][:4]
    span = torch.linalg.lstsq(directions.T, made.low_rank.right.double().T).solution
    assert (directions.T @ span - made.low_rank.right.double().T).abs().max() < 1e-3
    left_over = (weight - made.merged()).double() @ directions.T
    assert float(left_over.abs().max()) < 2e-3 * float((weight - made.dequantize()).abs().max())


def test_before_splits_off_the_largest_singular_values_or_the_largest_outputs() -> None:
    weight, x = layer(2)
    by_numbers = rounded(weight, None, "rtn", position="before", metric="plain").low_rank
    by_outputs = rounded(weight, moments(x), position="before").low_rank
    assert by_numbers is not None
    assert by_outputs is not None
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(by_numbers.product(), (u[:, :4] * s[:4]) @ v[:4], atol=5e-3, rtol=0)
    outputs = torch.linalg.svdvals(x.double() @ weight.double().T).square()
    assert error(weight, by_outputs.product(), x) == pytest.approx(float(outputs[4:].sum()), rel=2e-3)


def test_before_the_solver_rounds_what_the_stored_branch_leaves() -> None:
    weight, _ = layer(2)
    made = rounded(weight, None, "rtn", position="before", metric="plain")
    assert made.low_rank is not None
    rest = weight - made.low_rank.product()
    assert torch.equal(made.codes, rounded(rest, None, "rtn").codes)


@pytest.fixture(scope="module")
def rounded_inputs() -> tuple[Tensor, Tensor, Tensor, InputStatistics]:
    """Weights, inputs u, their rounded form x, and the statistics of both."""
    weight, u = layer(5, tokens=400)
    x = IntegerGrid(bits=3, group_size=-1).fake(u)
    change = u - x
    return (
        weight,
        u,
        x,
        replace(moments(x), rounding_error_cross=change.T @ x, rounding_error_second_moments=change.T @ change),
    )


@pytest.mark.parametrize("position", ["inside", "after"])
def test_output_error_is_the_best_regression_on_unrounded_inputs(position: str, rounded_inputs: Any) -> None:
    weight, u, x, statistics = rounded_inputs
    made = rounded(weight, statistics, position=position, metric="output_error")
    assert made.low_rank is not None
    wanted = (u @ weight.T - x @ made.dequantize().T).double()
    basis, _ = torch.linalg.qr(u.double())
    explained = torch.linalg.svdvals(basis.T @ wanted).square()
    least = float(wanted.square().sum() - explained[:4].sum())
    found = float((wanted - u.double() @ made.low_rank.product().double().T).square().sum())
    assert found == pytest.approx(least, rel=2e-3)
    other = rounded(weight, statistics, position=position, metric="hessian")
    assert other.low_rank is not None
    rest = (u @ weight.T - x @ other.dequantize().T).double() - u.double() @ other.low_rank.product().double().T
    assert found < float(rest.square().sum())


def test_output_error_after_a_target_is_of_the_target(rounded_inputs: Any) -> None:
    """A matrix that corrects the input error is what the codes and the branch should give on rounded inputs."""
    weight, u, x, statistics = rounded_inputs
    step = LowRank(rank=4, metric="output_error", damp_percent=0.0)
    rtn = rounded(weight, None, "rtn")
    state = PreparedWeight("layer", weight, statistics, None, GRID, rtn, corrects_input_error=True)
    (factors,) = step.apply(state).low_rank
    wanted = (x @ (weight - rtn.dequantize()).T).double()
    basis, _ = torch.linalg.qr(u.double())
    least = float(wanted.square().sum() - torch.linalg.svdvals(basis.T @ wanted).square()[:4].sum())
    found = float((wanted - u.double() @ factors.product().double().T).square().sum())
    assert found == pytest.approx(least, rel=2e-3)


def test_without_rounded_inputs_output_error_is_hessian() -> None:
    weight, x = layer(3)
    first, second = (rounded(weight, moments(x), metric=metric).low_rank for metric in ("output_error", "hessian"))
    assert first is not None
    assert second is not None
    assert torch.equal(first.product(), second.product())


def test_activation_residual_takes_what_rounding_of_inputs_would_change_most(rounded_inputs: Any) -> None:
    weight, u, x, statistics = rounded_inputs
    made = rounded(weight, statistics, position="before", metric="activation_residual").low_rank
    assert made is not None
    left = (u - x).double() @ (weight - made.product()).double().T
    whole = torch.linalg.svdvals((u - x).double() @ weight.double().T).square()
    assert float(left.square().sum()) == pytest.approx(float(whole[4:].sum()), rel=2e-3)


@pytest.mark.parametrize("solver", ["qronos", "gptq"])
@pytest.mark.parametrize("position", ["inside", "after"])
def test_the_branch_also_corrects_the_input_error(solver: str, position: str) -> None:
    """With a solver that aims at the outputs of the unrounded model, so does the branch: least squares on them."""
    problem = Problem()
    made = rounded(problem.weight, problem.statistics, solver, position=position)
    assert made.low_rank is not None
    wanted = problem.x @ problem.weight.double().T - problem.y @ made.dequantize().double().T
    basis, _ = torch.linalg.qr(problem.y)
    least = float(wanted.square().sum() - torch.linalg.svdvals(basis.T @ wanted).square()[:4].sum())
    assert problem.error(made.merged()) == pytest.approx(least, rel=5e-3)


def test_the_branch_is_fitted_after_refinement() -> None:
    weight, x = layer(4)
    weights = load_recipe(
        {"weights": {"bits": 2, "group_size": 16, "solver": "gptq", "refine": {}, "low_rank": {"rank": 4}}}
    ).weights
    assert [step.key for step in weights.layer_steps] == ["solver", "refine", "low_rank"]
    config = RoundingConfig(weights.layer_steps, GRID, None, lambda text: None)
    made = config.solve(config.prepare("layer", weight, moments(x)), GRID)
    alone = RoundingConfig(weights.layer_steps[:2], GRID, None, lambda text: None)
    assert torch.equal(made.codes, alone.solve(alone.prepare("layer", weight, moments(x)), GRID).codes)
    assert error(weight, made.merged(), x) < error(weight, rounded(weight, moments(x), position="after").merged(), x)


@pytest.mark.parametrize("position", ["before", "inside", "after"])
def test_layers_that_are_rounded_together_have_branches_of_their_own(position: str) -> None:
    weight, x = layer(6)
    weights = load_recipe(
        {"weights": {"bits": 2, "group_size": 16, "solver": "gptq", "low_rank": {"rank": 4, "position": position}}}
    ).weights
    config = RoundingConfig(weights.layer_steps, GRID, None, lambda text: None)
    together = config.solve_each(replace(config.prepare("two", weight, moments(x)), rows=(8, 16)), GRID)
    for made, rows in zip(together, weight.split([8, 16]), strict=True):
        alone = config.solve(config.prepare("one", rows, moments(x)), GRID)
        assert torch.equal(made.codes, alone.codes)
        torch.testing.assert_close(made.merged(), alone.merged(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("position", ["before", "inside", "after"])
def test_in_a_basis_the_factors_are_those_of_the_weights(position: str) -> None:
    weight, x = layer(7)
    weights = load_recipe(
        {"weights": {"bits": 2, "group_size": 16, "solver": "gptq", "low_rank": {"rank": 4, "position": position}}}
    ).weights
    basis = WeightBasis(alpha=0.5)
    errors = []
    for steps in (weights.layer_steps, [weights.solver]):
        config = RoundingConfig(steps, GRID, basis, lambda text: None)
        errors.append(error(weight, config.solve(config.prepare("layer", weight, moments(x)), GRID).merged(), x))
    assert errors[0] < errors[1]


def test_rows_that_lie_on_the_grid_keep_their_numbers() -> None:
    weight, x = layer(8)
    weight[:6] = rounded(weight[:6].clone(), None, "rtn").dequantize()
    for position in ("before", "inside", "after"):
        made = rounded(weight, moments(x), position=position)
        torch.testing.assert_close(made.merged()[:6], weight[:6], atol=2e-3, rtol=0)
        assert made.merged()[6:].ne(made.dequantize()[6:]).any()


def test_bits_are_counted_and_stored() -> None:
    weight, x = layer(9)
    plain, made = rounded(weight, moments(x)), rounded(weight, moments(x), rank=3)
    assert made.low_rank is not None
    assert made.bits - plain.bits == 16 * 3 * (24 + 32) == made.low_rank.bits
    arrays = made.pack()
    assert {name: (tuple(arrays[name].shape), arrays[name].dtype) for name in ("left", "right")} == {
        "left": ((24, 3), torch.float16),
        "right": ((3, 32), torch.float16),
    }
    again = LowRankFactors.unpack(3, arrays, (24, 32))
    assert torch.equal(again.left, made.low_rank.left)
    assert torch.equal(again.right, made.low_rank.right)
    with pytest.raises(InputError, match="right"):
        LowRankFactors.unpack(3, {"left": arrays["left"]}, (24, 32))
    with pytest.raises(InputError, match="left of shape"):
        LowRankFactors.unpack(2, arrays, (24, 32))


def test_factors_that_fp16_cannot_hold_are_refused() -> None:
    assert torch.equal(LowRankFactors.of(torch.zeros(3, 1), torch.zeros(1, 4)).product(), torch.zeros(3, 4))
    large = LowRankFactors.of(torch.full((3, 1), 1e8), torch.full((1, 4), 1e-4))
    torch.testing.assert_close(large.product(), torch.full((3, 4), 1e4), rtol=2e-3, atol=0)
    with pytest.raises(InputError, match="too large"):
        LowRankFactors.of(torch.full((3, 1), 1e8), torch.full((1, 4), 1e8))
