"""More bits for the first columns: the numbers of two integer grids, side by side, in true bits."""

import pytest
import torch

from gyroquant.errors import RecipeError
from gyroquant.grids import IntegerGrid, LeadingGrid, LeadingOrder, QuantizedWeight, leading_columns, stored_bits
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.grids import rounded, weights

GRID = LeadingGrid(bits=2, leading_bits=8, share=1 / 3, group_size=16, period=96)


def test_leading_columns_are_multiples_of_eight() -> None:
    assert [leading_columns(n, 0.125) for n in (64, 576, 2048, 24)] == [8, 72, 256, 8]
    with pytest.raises(RecipeError, match="8 leading directions of 8 leave no others"):
        leading_columns(8, 0.125)


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"symmetric": True, "midrise": True}])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_columns_are_those_of_integer_grids(settings: dict[str, bool], size: float) -> None:
    grid, matrix = GRID.model_copy(update=settings), weights(5) * size
    weight = rounded(grid, matrix)
    wide = torch.arange(192) % 96 < 32
    for kind, columns in zip(weight.grid.kinds, (~wide, wide), strict=True):  # type: ignore[attr-defined]
        part = matrix[:, columns]
        assert torch.equal(weight.dequantize()[:, columns], rounded(kind, part).dequantize())
    arrays = weight.pack()
    bound = grid.with_stored_scale(arrays)
    again = QuantizedWeight(bound, *bound.unpack(arrays, (5, 192)))
    assert torch.equal(again.dequantize(), weight.dequantize())
    groups = 5 * 12
    codes = 5 * (64 * 8 + 128 * 2)
    expected = codes + groups * (16 if settings else 24) + (0 if size == 1 else 32)
    assert weight.bits == expected
    assert 0 <= stored_bits(arrays) - expected < 8 * 2


@pytest.mark.parametrize("period", [-1, 64])
def test_inputs_have_a_scale_for_each_part_of_a_period(period: int) -> None:
    x = weights(6) * torch.where(torch.arange(192) % 64 < 8, 100.0, 1.0)
    grid = LeadingGrid(bits=4, leading_bits=8, period=period, group_size=-1, scale="minmax")
    whole = 192 if period == -1 else period
    first, result = leading_columns(whole, 0.125), grid.fake(x)
    for start in range(0, 192, whole):
        for bits, columns in ((8, slice(start, start + first)), (4, slice(start + first, start + whole))):
            alone = IntegerGrid(bits=bits, group_size=-1, scale="minmax").fake(x[:, columns])
            assert torch.equal(result[:, columns], alone)
    assert torch.equal(grid.for_columns(192).fake(x), result)  # type: ignore[arg-type]


def test_a_layer_that_reads_no_leading_directions_has_the_integer_grid() -> None:
    grid = LeadingGrid(bits=3, group_size=64, symmetric=True)
    assert grid.for_input(None) == IntegerGrid(bits=3, group_size=64, symmetric=True)
    assert grid.for_input(LeadingOrder(256, 0.5)) == LeadingGrid(
        bits=3, group_size=64, symmetric=True, period=256, share=0.5
    )
    row = weights(2)
    unbound = RoundToNearest().solve(row, LeadingGrid(group_size=24))
    bound = RoundToNearest().solve(row, LeadingGrid(group_size=24).for_columns(192))
    assert torch.equal(unbound.codes, bound.codes)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="group_size 64 does not divide the 72 leading columns of 576 of x: take 18,"):
        LeadingGrid(group_size=64).group_of(576, "x")
    with pytest.raises(RecipeError, match="needs a group_size for weights, such as 72 for x"):
        LeadingGrid(group_size=-1).check_shape(4, 576, "x")
    with pytest.raises(RecipeError, match="period 96 does not divide the 64 inputs of x"):
        GRID.group_of(64, "x")
    for settings in ({"leading_bits": 4}, {"period": 8}):
        with pytest.raises(ValueError, match="must be"):
            LeadingGrid(bits=4, **settings)
