"""IQK types: the nearest number, the scales of a row as multiples of one number, and errors like the program's own."""

import pytest
import torch

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Grid, GroupParams, IqkGrid, KQuantGrid, LookupGrid, QuantizedWeight
from gyroquant.rounding import InputStatistics, Refine, output_error
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.grids import rounded
from gyroquant.testing.solvers import problem

GRIDS = IqkGrid.examples()
BY_ROW = [grid for grid in GRIDS if grid.row_bits]
NUMBERS = {2: [-31, -13, 1, 17], 3: [-63, -40, -23, -10, 1, 13, 28, 47]}


@pytest.mark.parametrize(("bits", "zero"), [(2, 0.0), (2, -5.0), (3, 0.0), (3, -4.0)])
def test_a_step_gets_the_nearest_number(bits: int, zero: float) -> None:
    steps = torch.cat([torch.linspace(-90, 90, 2881), torch.tensor([-torch.inf, torch.inf])])
    params = GroupParams(torch.ones(1), torch.full((1,), zero))
    numbers, table = IqkGrid(bits=bits).nearest(steps, params), torch.tensor(NUMBERS[bits]) - zero
    assert torch.equal((numbers - steps).abs()[:-2], (steps[:-2, None] - table).abs().amin(1))
    assert numbers[-2:].tolist() == [table[0], table[-1]]


@pytest.mark.parametrize(  # the mean squared error of ik_llama.cpp's own quantizer on these numbers
    ("name", "theirs"),
    [
        *(("IQ2_K", 0.0780), ("IQ3_K", 0.0172), ("IQ4_K", 0.00388)),
        *(("IQ2_KS", 0.0966), ("IQ3_KS", 0.0224), ("IQ4_KS", 0.00513)),
    ],
)
def test_errors_are_below_those_of_the_program(name: str, theirs: float) -> None:
    weight = torch.randn(96, 2048, generator=torch.Generator().manual_seed(0))
    (grid,) = [grid for grid in GRIDS if grid.type_name == name]
    assert float((rounded(grid, weight).dequantize() - weight).square().mean()) < 0.995 * theirs


@pytest.mark.parametrize("grid", BY_ROW, ids=lambda grid: grid.type_name)
def test_the_scales_of_a_row_are_multiples_of_one_number(grid: IqkGrid) -> None:
    weight = torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6)[:, None]
    params = rounded(grid, weight).params
    numbers, codes, _ = grid.stored_scales(params)
    assert numbers.shape == (6, 1)
    assert codes.shape == (6, 32)
    multiples = params.scale[..., 0] / numbers
    assert torch.equal(multiples, multiples.round())
    assert (multiples.abs().amax(1) == (127 if grid.bits == 4 else 16)).all()
    assert rounded(grid, weight).bits == int(weight.numel() * grid.bits) + 192 * grid.group_bits + 6 * grid.row_bits


@pytest.mark.parametrize("grid", BY_ROW, ids=lambda grid: grid.type_name)
def test_groups_that_are_fitted_again_keep_the_number_of_the_row(grid: IqkGrid) -> None:
    generator = torch.Generator().manual_seed(1)
    groups = torch.randn(5, 32, 32, generator=generator)
    before = grid.fit(groups)
    other = 3 * torch.randn(5, 8, 32, generator=generator)
    again = grid.refit(other, before, 16)
    params = GroupParams(before.scale.clone(), before.zero.clone())
    params.scale[:, 16:24], params.zero[:, 16:24] = again.scale, again.zero
    assert torch.equal(grid.round_params(params.scale, params.zero).scale, params.scale)
    assert torch.equal(grid.stored_scales(params)[0].abs(), grid.stored_scales(before)[0].abs())
    close = grid.round_within(1.01 * again.scale, again.zero, params, 16)
    assert torch.equal(grid.stored_scales(params)[0].abs(), grid.stored_scales(before)[0].abs())
    assert ((close.scale / again.scale - 1).abs() < 0.5).all()


@pytest.mark.parametrize("grid", [GRIDS[0], *BY_ROW[::2]], ids=lambda grid: grid.type_name)
def test_error_feedback_and_refinement_lower_the_error_of_outputs(grid: IqkGrid) -> None:
    """Of rows of several super-blocks, whose later ones are fitted again when GPTQ reaches them."""
    weight, statistics = problem(rows=16, columns=512)
    nearest = RoundToNearest().solve(weight, grid)
    solved, fixed = (Gptq(static_groups=static).solve(weight, grid, statistics) for static in (False, True))
    refined = Refine(passes=2).run(weight, solved, statistics)
    errors = [output_error(weight, found.dequantize(), statistics) for found in (nearest, fixed, solved, refined)]
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2] > 1.3 * errors[3]
    codes, params = grid.unpack(refined.pack(), (16, 512))
    assert torch.equal(QuantizedWeight(grid, codes, params).dequantize(), refined.dequantize())


def test_other_grids_that_go_with_it() -> None:
    grid = IqkGrid(bits=2, two_bits="IQ2_KS")
    assert grid.at_bits(3) == IqkGrid(bits=3, two_bits="IQ2_KS")
    assert grid.at_bits(6) == KQuantGrid(bits=6)
    assert grid.for_columns(512) is grid
    assert grid.for_columns(96) == LookupGrid(table="iq4_nl")
    with pytest.raises(RecipeError, match="a super-block of 256 does not divide the 100 inputs of w"):
        grid.for_columns(100).check_shape(8, 100, "w")


@pytest.mark.parametrize("grid", [IqkGrid(bits=2), IqkGrid(bits=2, two_bits="IQ2_KS")], ids=lambda g: g.type_name)
def test_arrays_without_a_part_are_refused(grid: Grid) -> None:
    arrays = rounded(grid, torch.ones(2, 256)).pack()
    for part in ("multiples", "choices", "scales"):
        with pytest.raises(InputError, match=f"the array of {part} of a rounded weight is missing"):
            grid.unpack({key: array for key, array in arrays.items() if key != part}, (2, 256))


def test_statistics_of_no_token_round_to_nearest() -> None:
    weight, grid = problem(rows=8, columns=512)[0], BY_ROW[0]
    solved = Gptq().solve(weight, grid, InputStatistics(torch.zeros(512, 512), 0))
    assert torch.equal(solved.codes, RoundToNearest().solve(weight, grid).codes)
