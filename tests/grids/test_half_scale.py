"""Scales that fp16 does not hold: a scale of the whole weight takes what they lack, and ordinary weights need none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError
from gyroquant.grids import Fp4Grid, Fp8Grid, Grid, HalfScaleGrid, IntegerGrid, QuantizedWeight, stored_bits
from gyroquant.grids.error import weight_error
from gyroquant.rounding import InputStatistics
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest

GRIDS: list[HalfScaleGrid] = [
    *(IntegerGrid(bits=bits, group_size=32, symmetric=s) for bits in (2, 4, 8) for s in (False, True)),
    IntegerGrid(bits=8, group_size=-1, scale="minmax"),
    IntegerGrid(bits=2, group_size=32, symmetric=True, midrise=True),
    Fp4Grid(group_size=32),
    Fp8Grid(),
    Fp8Grid(format="e5m2"),
]


def weight(rows: int = 16, columns: int = 192, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(matrix: torch.Tensor, grid: Grid) -> QuantizedWeight:
    return RoundToNearest().solve(matrix, grid.with_tensor_scale(matrix))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestEverySize:
    @pytest.mark.parametrize("exponent", [-100, -42, -28, -22, 14, 90])
    def test_small_and_large_weights_lose_no_more_than_ordinary_ones(self, grid: HalfScaleGrid, exponent: int) -> None:
        usual = weight_error(weight(), rounded(weight(), grid).dequantize())
        matrix = weight() * 2.0**exponent
        assert weight_error(matrix, rounded(matrix, grid).dequantize()) < 1.03 * usual

    def test_what_is_stored_comes_back(self, grid: HalfScaleGrid) -> None:
        made = rounded(weight() * 2.0**-38, grid)
        arrays = made.pack()
        assert arrays["global"].dtype == torch.float32
        bound = grid.with_stored_scale(arrays)
        codes, params = grid.unpack(arrays, (16, 192))
        assert torch.equal(params.scale, made.params.scale)
        assert torch.equal(QuantizedWeight(bound, codes, params).dequantize(), made.dequantize())
        again = QuantizedWeight(bound, codes, params).pack()
        assert all(torch.equal(array, again[part]) for part, array in arrays.items())
        same = bound.round_params(params.scale, params.zero)
        assert torch.equal(same.scale, params.scale)
        assert stored_bits(arrays) == pytest.approx(made.bits, abs=16)
        assert made.bits == rounded(weight(), grid).bits + 32

    def test_ordinary_weights_have_none_of_it(self, grid: HalfScaleGrid) -> None:
        matrix = weight()
        matrix[3], matrix[5] = 0, matrix[5] * 1e-12  # a row that is dead, and one that is as good as dead
        assert grid.with_tensor_scale(matrix) is grid
        assert "global" not in rounded(matrix, grid).pack()
        assert grid.with_tensor_scale(torch.zeros(4, 64)) is grid

    def test_a_small_row_among_large_ones_keeps_its_numbers(self, grid: HalfScaleGrid) -> None:
        matrix = weight()
        matrix[5] *= 2.0**-20
        found = rounded(matrix, grid).dequantize()
        usual = weight_error(weight()[5], rounded(weight(), grid).dequantize()[5])
        assert weight_error(matrix[5], found[5]) < 1.03 * usual + 1e-7
        others = torch.arange(16) != 5  # come out as they would without it
        assert torch.equal(found[others], rounded(weight(), grid).dequantize()[others])


def test_solvers_keep_small_scales() -> None:
    x = torch.randn(400, 192, generator=torch.Generator().manual_seed(2))
    statistics = InputStatistics(x.T @ x, 400)
    grid, small = IntegerGrid(bits=4, group_size=32), weight() * 2.0**-38
    usual = weight_error(weight(), Gptq().solve(weight(), grid, statistics).dequantize())
    found = Gptq().solve(small, grid.with_tensor_scale(small), statistics).dequantize()
    assert weight_error(small, found) == pytest.approx(usual, rel=0.02)


@given(st.floats(1e-37, 1e36), st.sampled_from(GRIDS))
@settings(max_examples=15, deadline=None)
def test_weights_of_any_size_are_rounded(size: float, grid: HalfScaleGrid) -> None:
    matrix = weight() / 5 * size
    usual = weight_error(weight(), rounded(weight(), grid).dequantize())
    if size > 1e-31:
        assert weight_error(matrix, rounded(matrix, grid).dequantize()) < 1.1 * usual
    assert rounded(matrix, grid).dequantize().isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_still_refused(bad: float) -> None:
    matrix = weight() * 1e-9
    matrix[2, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        rounded(matrix, GRIDS[0])


def test_the_error_of_weights_is_right_where_fp32_has_no_squares() -> None:
    small = torch.full((64, 64), 1e-25)
    assert weight_error(small, 0.9 * small) == pytest.approx(0.01, rel=1e-3)
    assert weight_error(small, torch.zeros(64, 64)) == pytest.approx(1)
    assert weight_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
