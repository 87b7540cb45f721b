"""Floating-point elements and their scales, held against definitions in exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Fp4Grid, Fp8Grid, Grid, GroupParams, Mxfp4Grid, Nvfp4Grid, QuantizedWeight
from gyroquant.grids.floating import nearest_e2m1

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
ONE = GroupParams(torch.ones(1, 1), torch.zeros(1, 1))
FP8 = {"e4m3": (3, 7), "e5m2": (2, 15)}  # bits of mantissa, bias of the exponent


def every_code(grid: Grid) -> torch.Tensor:
    return grid.decode(torch.arange(2**grid.bits).to(torch.uint8)[None], ONE)[0]


def on_e2m1(x: torch.Tensor) -> torch.Tensor:
    return nearest_e2m1(x, torch.ones(1))


def nearest_even(value: float, numbers: list[float]) -> float:
    """The nearest of numbers that are listed by code; of two as near, the one of even code."""
    exact = Fraction(value)
    return min(enumerate(numbers), key=lambda one: (abs(Fraction(one[1]) - abs(exact)), one[0] % 2))[1]


def groups(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """Squared error of each group."""
    params = grid.with_tensor_scale(x).fit(x)
    return (grid.nearest(x, params) - x).square().sum(-1)


@pytest.mark.parametrize("grid", [Fp4Grid(), Mxfp4Grid(), Nvfp4Grid()], ids=str)
def test_codes_of_four_bits_are_sign_exponent_mantissa(grid: Grid) -> None:
    assert every_code(grid).tolist() == [*E2M1, *(-value for value in E2M1)]


@pytest.mark.parametrize("form", FP8)
def test_codes_of_eight_bits_are_sign_exponent_mantissa(form: str) -> None:
    mantissa_bits, bias = FP8[form]
    for code, value in enumerate(every_code(Fp8Grid(format=form)).tolist()):
        exponent, mantissa = code % 128 >> mantissa_bits, code % 2**mantissa_bits
        if form == "e5m2" and exponent == 31:
            assert not math.isfinite(value)
        elif form == "e4m3" and code % 128 == 127:
            assert math.isnan(value)
        else:
            fraction = mantissa / 2**mantissa_bits + (exponent > 0)
            assert value == (-1) ** (code >> 7) * fraction * 2.0 ** (max(exponent, 1) - bias)


def test_ties_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert on_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert on_e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    up, down = ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(0.0))
    assert on_e2m1(up).tolist() == E2M1[1:]
    assert on_e2m1(down).tolist() == E2M1[:-1]


@given(st.floats(-20, 20, width=32))
@settings(max_examples=300, deadline=None)
def test_every_number_is_rounded_exactly(value: float) -> None:
    found = float(on_e2m1(torch.tensor([value])))
    assert found == math.copysign(nearest_even(value, E2M1), value)
    grid = Fp4Grid()
    assert float(grid.decode(grid.encode(torch.tensor([[value]]), ONE), ONE)) == found


@pytest.mark.parametrize("form", FP8)
@given(value=st.floats(-(2.0**20), 2.0**20, width=32))
@settings(max_examples=150, deadline=None)
def test_eight_bits_round_to_even_and_saturate(form: str, value: float) -> None:
    grid = Fp8Grid(format=form)
    numbers = [one for one in every_code(grid)[:128].tolist() if math.isfinite(one)]
    found = float(grid.decode(grid.encode(torch.tensor([[value]]), ONE), ONE))
    assert found == math.copysign(nearest_even(value, numbers), value)


def test_infinite_quotients_saturate() -> None:
    """A scale fitted to zeros is tiny; what a solver adds to the group later is clipped, never NaN."""
    for grid in (Fp4Grid(), Fp8Grid(), Mxfp4Grid(), Nvfp4Grid().with_tensor_scale(torch.zeros(1, 16))):
        params = grid.fit(torch.zeros(1, 32))
        codes = grid.encode(torch.tensor([[1e30, -1e30]]), params)
        assert torch.equal(grid.decode(codes, params), every_code(grid)[codes.int()] * params.scale)
        assert grid.decode(codes, params).isfinite().all()


@pytest.mark.parametrize("kind", [Fp4Grid, Nvfp4Grid])
def test_searched_scales_are_never_worse(kind: type[Grid]) -> None:
    x = groups(500, 3, 32 if kind is Fp4Grid else 16)
    searched, plain = error(kind(scale="mse"), x), error(kind(scale="minmax"), x)
    assert (searched <= plain).all()
    assert searched.sum() < 0.85 * plain.sum()


def test_the_largest_weight_becomes_the_largest_element() -> None:
    x = groups(50, 3, 64)
    for grid in (Fp4Grid(scale="minmax"), Fp8Grid(), Fp8Grid(format="e5m2")):
        largest = grid.nearest(x, grid.fit(x)).abs().amax(-1)
        assert torch.allclose(largest, x.abs().amax(-1), rtol=2e-2)


SCALES = {  # 2^exponent for a largest magnitude f * 2^exponent, as a multiple of a quarter of it
    "floor": lambda f: 1,
    "round": lambda f: 2 if f >= 1.75 else 1,
    "ceil": lambda f: 2 if f > 1.5 else 1,
}


@pytest.mark.parametrize("rounding", SCALES)
@given(fraction=st.floats(1, 2, exclude_max=True, width=32), exponent=st.integers(-100, 100))
@settings(max_examples=100, deadline=None)
def test_microscaling_takes_the_power_of_two_that_it_says(rounding: str, fraction: float, exponent: int) -> None:
    grid = Mxfp4Grid(scale_rounding=rounding)
    x = torch.zeros(1, 1, 32)
    x[..., 5] = -fraction * 2.0**exponent
    params = grid.fit(x)
    assert float(params.scale) == SCALES[rounding](fraction) * 2.0 ** (exponent - 2)
    stored = QuantizedWeight(grid, grid.encode(x, params)[0], params).pack()["scales"]
    assert 2.0 ** (int(stored) - 127) == float(params.scale)
    if rounding == "ceil":
        assert 3 < float(x.abs().max() / params.scale) <= 6


def test_searched_powers_of_two_are_never_worse() -> None:
    x = groups(400, 3, 32) * torch.logspace(-3, 3, 400)[:, None, None]
    best = error(Mxfp4Grid(scale_rounding="mse"), x)
    for rounding in SCALES:
        assert (best <= error(Mxfp4Grid(scale_rounding=rounding), x)).all()


def test_powers_of_two_reach_from_end_to_end() -> None:
    """Subnormal and largest fp32 numbers: the scale stays a normal fp32 number and a byte that is no NaN."""
    for rounding in (*SCALES, "mse"):
        grid = Mxfp4Grid(scale_rounding=rounding)
        for value in (1e-45, 1e-38, 3.4e38):
            params = grid.fit(torch.full((1, 1, 32), value))
            byte = int(grid.pack(torch.zeros(1, 32, dtype=torch.uint8), params)["scales"])
            assert 1 <= byte <= 254
            assert float(params.scale) == 2.0 ** (byte - 127)


def test_the_scale_of_the_whole_weight_is_stored() -> None:
    x = groups(6, 4, 16)
    grid = Nvfp4Grid(scale="minmax").with_tensor_scale(x)
    assert grid.tensor_scale == float(x.abs().max() / (6 * 448))
    params = grid.fit(x)
    ratios = params.scale / grid.tensor_scale
    assert torch.allclose(ratios, ratios.to(torch.float8_e4m3fn).float(), rtol=1e-6)
    assert float(ratios.max()) == pytest.approx(448)
    arrays = grid.pack(grid.encode(x, params).view(6, 64), params)
    assert {part: (array.dtype, array.numel()) for part, array in arrays.items()} == {
        "codes": (torch.uint8, 6 * 64 // 2),
        "scales": (torch.uint8, 6 * 4),
        "global": (torch.float32, 1),
    }
    assert torch.equal(Nvfp4Grid().unpack(arrays, (6, 64))[1].scale, params.scale)  # by a grid that knows nothing
    with pytest.raises(InputError, match="array of global of a rounded weight is missing"):
        grid.unpack({part: array for part, array in arrays.items() if part != "global"}, (6, 64))


def test_small_groups_beside_large_ones_keep_a_scale() -> None:
    x = groups(2, 4, 16) * torch.tensor([1.0, 1e-2, 1e-4, 1e-9])[:, None]
    grid = Nvfp4Grid().with_tensor_scale(x)
    params = grid.fit(x)
    found = QuantizedWeight(Nvfp4Grid(), grid.encode(x, params).view(2, 64), params).dequantize().view(2, 4, 16)
    relative = (found - x).square().sum((0, 2)) / x.square().sum((0, 2))
    assert (relative[:3] < 0.02).all()
    assert found[:, 3].abs().max() == 0


def test_a_grid_that_knows_no_weight_says_so() -> None:
    with pytest.raises(InputError, match=r"with_tensor_scale\(weight\)"):
        Nvfp4Grid().fit(groups(2, 1, 16))


@pytest.mark.parametrize("grid", [Mxfp4Grid(), Nvfp4Grid()], ids=str)
def test_groups_of_one_size_only(grid: Grid) -> None:
    with pytest.raises(RecipeError, match=rf"divide the 40 inputs of k_proj; {grid.grid} has no other"):
        grid.group_of(40, "k_proj")
    with pytest.raises(ValueError, match=str(grid.group_size)):
        type(grid)(group_size=64)
    with pytest.raises(ValueError, match="4"):
        type(grid)(bits=2)
