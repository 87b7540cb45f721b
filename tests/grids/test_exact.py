"""Weights that lie on a grid already come back as they are, and all others as the search alone would have them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.grids import Fp4Grid, Fp8Grid, Grid, GroupParams, IntegerGrid, Mxfp4Grid, Nvfp4Grid, integer
from gyroquant.rounding.solvers.rtn import RoundToNearest

ROUNDING = 2.0**-11  # of a scale to fp16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    return RoundToNearest().solve(weight, grid.with_tensor_scale(weight)).dequantize()


def of_random_codes(grid: Grid, scale: torch.Tensor, seed: int, columns: int) -> torch.Tensor:
    """A weight of random codes and zero points, for scales of shape (rows, groups, 1)."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups, _ = scale.shape
    codes = torch.randint(0, 2**grid.bits, (rows, groups, columns // groups), generator=generator).to(torch.uint8)
    levels = 2**grid.bits - 1
    zero = torch.zeros_like(scale)
    if isinstance(grid, IntegerGrid):
        zero = torch.randint(0, levels + 1, scale.shape, generator=generator).float()
        if grid.symmetric:
            zero = torch.full_like(scale, levels / 2 if grid.midrise else 2 ** (grid.bits - 1))
    numbers = grid.decode(codes, GroupParams(scale, zero)).view(rows, columns)
    return torch.where(numbers.isfinite(), numbers, 0.0)


INTEGERS = st.builds(
    lambda bits, size, kind: IntegerGrid(
        bits=bits, group_size=size, symmetric=kind != "asymmetric", midrise=kind == "midrise"
    ),
    st.integers(2, 8),
    st.sampled_from([16, 32, -1]),
    st.sampled_from(["asymmetric", "symmetric", "midrise"]),
)
FLOATS = st.sampled_from([Fp4Grid(group_size=32), Fp4Grid(), Fp8Grid(group_size=16), Fp8Grid(), Fp8Grid(format="e5m2")])


@given(st.one_of(INTEGERS, FLOATS), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_what_random_codes_stand_for_is_given_back(grid: Grid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = (0.01 + torch.rand(3, 96 // grid.group_of(96), 1, generator=generator)).half().float()
    if isinstance(grid, IntegerGrid) and grid.symmetric:
        scale *= 1 - 2 * torch.randint(0, 2, scale.shape, generator=generator)
    weight = of_random_codes(grid, scale, seed, 96)
    assert ((nearest(weight, grid) - weight).abs() <= ROUNDING * weight.abs()).all()


@given(st.sampled_from(["floor", "round", "ceil", "mse"]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_what_random_codes_of_mxfp4_stand_for_is_given_back(rounding: str, seed: int) -> None:
    grid = Mxfp4Grid(scale_rounding=rounding)
    scale = torch.exp2(torch.randint(-20, 20, (3, 3, 1), generator=torch.Generator().manual_seed(seed)).float())
    weight = of_random_codes(grid, scale, seed, 96)
    assert torch.equal(nearest(weight, grid), weight)


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_what_random_codes_of_nvfp4_stand_for_is_given_back(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = (1 + 446 * torch.rand(3, 6, 1, generator=generator)).to(torch.float8_e4m3fn).float() * 1.7e-4
    weight = of_random_codes(Nvfp4Grid(), scale, seed, 96)
    assert torch.allclose(nearest(weight, Nvfp4Grid()), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ternary_weights_stay_ternary(bits: int, symmetric: bool) -> None:
    weight = 0.03 * torch.randint(-1, 2, (64, 256), generator=torch.Generator().manual_seed(0)).float()
    found = nearest(weight, IntegerGrid(bits=bits, group_size=64, symmetric=symmetric))
    assert (found[weight == 0] == 0).all()
    assert ((found - weight).abs() <= ROUNDING * weight.abs()).all()
    exact = nearest(weight.half().float(), IntegerGrid(bits=bits, group_size=64, symmetric=symmetric))
    assert torch.equal(exact, weight.half().float())  # fp16 holds the scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "least"), [(4, -8), (4, -7), (8, -127), (5, -16)])
def test_models_that_were_rounded_before_stay(bits: int, least: int, dtype: torch.dtype) -> None:
    """As GGUF's Q4_0 and Q8_0 have them, a scale for 32 weights, stored in any dtype."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(least, 2 ** (bits - 1), (16, 8, 32), generator=generator)
    scale = (0.001 + 0.01 * torch.rand(16, 8, 1, generator=generator)).half().float()
    weight = (steps * scale).view(16, 256)
    found = nearest(weight.to(dtype).float(), IntegerGrid(bits=bits, group_size=32, symmetric=True))
    tolerance = {torch.float32: 1e-7, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}[dtype]
    if dtype != torch.bfloat16 or bits < 8:  # whose 8 digits leave more than one code for a weight of 8 bits
        assert ((found - weight).abs() <= tolerance * weight.abs()).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_other_weights_get_what_the_search_alone_finds(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: Gaussian ones, with and without the rounding of 16 bits, sparse ones, and groups of zeros."""
    weight = torch.cat([drawn(12, 512), drawn(12, 512, seed=1).bfloat16().float(), drawn(4, 512).relu()])
    weight[3] = 0
    for size in (16, 64, -1):
        grid = IntegerGrid(bits=bits, group_size=size, symmetric=symmetric)
        with_it = RoundToNearest().solve(weight, grid)
        with monkeypatch.context() as patch:
            patch.setattr(integer, "prefer_exact", lambda grid, groups, found, tried: found)
            alone = RoundToNearest().solve(weight, grid)
        assert torch.equal(with_it.codes, alone.codes)
        assert torch.equal(with_it.params.scale, alone.params.scale)
        assert torch.equal(with_it.params.zero, alone.params.zero)


def test_one_group_on_the_grid_among_others() -> None:
    grid = IntegerGrid(bits=4, group_size=32)
    weight = drawn(3, 96)
    weight[1, 32:64] = 0.0625 * torch.arange(-3, 5).repeat(4)
    found = nearest(weight, grid)
    assert torch.equal(found[1, 32:64], weight[1, 32:64])
    assert (found - weight).norm() > 0.02 * weight.norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "row",
    [
        torch.full((16,), 0.37),
        torch.full((16,), -0.37),
        torch.tensor([0.5] + [0.0] * 15),
        torch.tensor([-0.5] + [-0.0] * 15),
    ],
    ids=["constant", "negative constant", "one weight", "one weight and negative zeros"],
)
def test_groups_of_one_value(row: torch.Tensor, bits: int, symmetric: bool) -> None:
    found = nearest(row[None], IntegerGrid(bits=bits, group_size=16, symmetric=symmetric))
    if bits > 1 or bool(row.all()) or not symmetric:  # one symmetric bit has no zero
        assert ((found - row).abs() <= ROUNDING * row.abs()).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", ["minmax", "mse"])
def test_groups_of_one_sign_use_the_grid_that_there_is(sign: int, symmetric: bool, scale: str) -> None:
    """Their zero point lies at an end of the codes, and nothing is clipped: W and -W are off alike."""
    row = sign * (0.2 + drawn(20, 64).abs())
    grid = IntegerGrid(bits=8, group_size=64, symmetric=symmetric, scale=scale)
    assert (nearest(row, grid) - row).norm() < (0.008 if symmetric else 0.004) * row.norm()
    mirrored = (nearest(-row, grid) + row).norm()
    assert mirrored == pytest.approx(float((nearest(row, grid) - row).norm()), rel=0.02)
