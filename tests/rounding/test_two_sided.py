"""Rounding with feedback on both sides of a matrix: each choice of a code against the least cost that it allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.rounding import InputStatistics, two_sided
from gyroquant.rounding.base import Solver
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.solvers import Gptq, RoundToNearest
from gyroquant.testing.grids import columns_for
from gyroquant.testing.solvers import ROWS, problem


def moments(n: int, seed: int) -> Tensor:
    """Second moments of strongly correlated numbers, fp32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) * torch.logspace(0, -1, n)
    gram = x.T @ x / len(x)
    return gram / gram.diagonal().mean() + 0.01 * torch.eye(n)


def cost(difference: Tensor, outputs: Tensor, inputs: Tensor) -> float:
    """``tr(H_O D H_I D^T)``, fp64."""
    difference = difference.double()
    return float(((outputs.double() @ difference @ inputs.double()) * difference).sum())


def greedy_by_brute_force(weight: Tensor, rounded: QuantizedWeight, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The numbers, chosen column after column and in each from the first row to the last. Each is the one of all
    numbers of its group with which the later entries, as free numbers, reach the least cost.
    """
    rows, columns = weight.shape
    h = torch.kron(inputs.double(), outputs.double())  # of errors in the order in which they are made
    wanted, errors = weight.T.reshape(-1).double(), torch.zeros(rows * columns, dtype=torch.float64)
    size = columns // rounded.params.scale.shape[1]
    for entry in range(rows * columns):
        rest, best = slice(entry + 1, None), float("inf")
        params = rounded.params[entry % rows, entry // rows // size]
        numbers = rounded.grid.decode(torch.arange(rounded.grid.code_count, dtype=torch.uint8), params)
        kept = errors[entry]
        for number in numbers.double():
            errors[entry], errors[rest] = wanted[entry] - number, 0
            if entry + 1 < len(errors):
                errors[rest] = torch.linalg.solve(h[rest, rest], -h[rest, : entry + 1] @ errors[: entry + 1])
            least = float(errors @ h @ errors)
            if least < best:
                best, kept = least, errors[entry].clone()
        errors[entry], errors[rest] = kept, 0
    return (wanted - errors).view(columns, rows).T.float()


@pytest.mark.parametrize(("bits", "size", "columns"), [(2, -1, 7), (3, -1, 4), (2, 16, 16)])
@pytest.mark.parametrize("numba", [True, False])
def test_every_code_is_the_best_one_for_free_later_entries(
    bits: int, size: int, columns: int, numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, grid = torch.randn(5, columns, generator=generator), IntegerGrid(bits=bits, group_size=size)
    if not numba:
        monkeypatch.setattr(two_sided, "has_compiler", lambda: False)
    outputs, inputs = moments(5, 1), moments(columns, 2)
    statistics = InputStatistics(inputs, 100, gradient_moments=outputs)
    solved = Gptq(damp_percent=0, static_groups=True).solve(weight, grid, statistics)
    expected = greedy_by_brute_force(weight, solved, outputs, inputs)
    assert torch.equal(solved.dequantize(), expected)
    plain = Gptq(damp_percent=0, static_groups=True).solve(weight, grid, replace(statistics, gradient_moments=None))
    assert not torch.equal(plain.dequantize(), expected)


def one_of(*kinds: str) -> list[Grid]:
    """The first example of each kind of grid."""
    return [Grid.registry[kind].examples()[0] for kind in kinds]


@pytest.mark.parametrize("grid", one_of("integer", "fp4", "iq", "k_quant"), ids=lambda grid: grid.grid)
@pytest.mark.parametrize("static", [True, None])
def test_with_equal_outputs_it_is_gptq(grid: Grid, static: bool | None) -> None:
    rows = 12
    weight, statistics = problem(rows, columns_for(grid))
    bound, solver = grid.with_tensor_scale(weight), Gptq(static_groups=static)
    plain = solver.solve(weight, bound, statistics)
    equal = solver.solve(weight, bound, replace(statistics, gradient_moments=3 * torch.eye(rows)))
    assert float((equal.codes == plain.codes).float().mean()) > 0.999  # sums in another order
    outputs = moments(rows, 4)
    both = solver.solve(weight, bound, replace(statistics, gradient_moments=outputs))
    costs = [cost(weight - q.dequantize(), outputs, statistics.second_moments) for q in (both, plain)]
    assert costs[0] < 0.9 * costs[1]


def by_columns(weight: Tensor, grid: Grid, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The codes, one tile of columns and one row after another."""
    params = grid.fit(weight.unflatten(1, (-1, grid.group_of(weight.shape[1]))))
    free, tile = weight.double().clone(), grid.tile_columns
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for start in range(0, weight.shape[1], tile):
        columns, group = slice(start, start + tile), start // grid.group_of(weight.shape[1])
        down, number = free[:, columns].clone(), torch.empty(len(weight), tile, dtype=torch.float64)
        for row in range(len(weight)):
            own = params[row : row + 1, group]
            codes[row, columns] = grid.encode(down[row : row + 1].float(), own)[0]
            number[row] = grid.decode(codes[row : row + 1, columns], own)[0]
            error = (down[row] - number[row]) / outputs[row, row]
            down[row + 1 :] -= torch.outer(outputs[row, row + 1 :], error)
        corner = inputs[columns, columns]
        errors = torch.linalg.solve_triangular(corner, free[:, columns] - number, upper=True, left=False)
        free[:, start + tile :] -= errors @ inputs[columns, start + tile :]
    return codes


@pytest.mark.parametrize("grid", one_of("integer", "iq"), ids=lambda grid: grid.grid)
@pytest.mark.parametrize("together", [512, 7])
@pytest.mark.parametrize("numba", [True, False])
def test_anti_diagonals_are_column_after_column(
    grid: Grid, together: int, numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rows are worked on in several parts, and with compiled loops."""
    monkeypatch.setattr(two_sided, "_ROWS", together)
    if not numba:
        monkeypatch.setattr(two_sided, "has_compiler", lambda: False)
    weight, statistics = problem(18, columns_for(grid))
    bound, outputs = grid.with_tensor_scale(weight), moments(18, 5)
    solved = Gptq(static_groups=True).solve(weight, bound, replace(statistics, gradient_moments=outputs))
    inputs = inverse_factor(statistics.second_moments, 0.01)
    expected = by_columns(weight, bound, inputs, inverse_factor(outputs, 0.0))
    assert float((solved.codes == expected).float().mean()) > 0.995  # fp32 there, fp64 here


def test_columns_in_order_of_their_moments_and_weights_on_the_grid() -> None:
    weight, statistics = problem()
    outputs, grid = moments(ROWS, 6), IntegerGrid(bits=2, group_size=64)
    given = replace(statistics, gradient_moments=outputs)
    found = {order: Gptq(act_order=order, static_groups=True).solve(weight, grid, given) for order in (False, True)}
    plain = Gptq(act_order=True).solve(weight, grid, statistics)
    costs = [cost(weight - q.dequantize(), outputs, statistics.second_moments) for q in (*found.values(), plain)]
    assert max(costs[:2]) < 0.8 * costs[2]
    on_grid = RoundToNearest().solve(weight, grid).dequantize()
    torch.testing.assert_close(Gptq().solve(on_grid, grid, given).dequantize(), on_grid, rtol=1e-5, atol=1e-6)


def test_other_solvers_say_that_they_cannot() -> None:
    assert [name for name, kind in Solver.registry.items() if kind.uses_gradient_moments] == ["gptq"]
