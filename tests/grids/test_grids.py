"""The contract of grids, for every kind that is registered, and what is special about some."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import (
    Fp4Grid,
    Fp8Grid,
    Grid,
    GroupParams,
    IntegerGrid,
    Mxfp4Grid,
    Nvfp4Grid,
    RealZeroGrid,
    grid_from,
    stored_bits,
)
from gyroquant.testing import parametrize_with_checks
from gyroquant.testing.grids import rounded, weights


@parametrize_with_checks(Grid.registry)
def test_every_grid_keeps_its_contract(instance: Grid, check: Any) -> None:
    check(instance)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_scales_are_never_worse(bits: int, symmetric: bool) -> None:
    errors = {}
    for scale in ("minmax", "mse"):
        grid = IntegerGrid(bits=bits, group_size=64, symmetric=symmetric, scale=scale)
        errors[scale] = (rounded(grid, weights(64)).dequantize() - weights(64)).square().view(64, 3, 64).sum(-1)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < 0.97 * errors["minmax"].sum()


@pytest.mark.parametrize("shape", [(5, 3, 16), (3000, 1, 64), (40, 1, 3000)], ids=str)
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"symmetric": True, "midrise": True}], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_candidates_at_once_are_those_one_by_one(shape: tuple[int, ...], kind: dict[str, bool], size: float) -> None:
    """Bit for bit, in one piece and in several, and where the first of equals counts."""
    groups = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups[1] = 0
    grid = IntegerGrid(bits=2, group_size=-1, **kind).with_tensor_scale(groups.flatten(1))
    low, high = grid._range(groups)
    candidates = [grid._params(low * factor, high * factor) for factor in (1.0, 0.9, 0.9, 0.7, 0.5)]
    wanted = grid.least_squares(groups, candidates)
    tried = (torch.cat([getattr(one, key) for one in candidates], -1) for key in ("scale", "zero"))
    found = grid.least_squares_of(groups, GroupParams(*tried))
    assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(found.zero, wanted.zero)


def test_symmetric_grids_use_their_full_range() -> None:
    grid = IntegerGrid(bits=2, group_size=16, symmetric=True, scale="minmax")
    row = torch.linspace(-0.5, 1.0, 16)[None]
    weight = rounded(grid, row)
    assert weight.dequantize().max() == 1.0  # the extreme is met exactly, by a negative scale
    assert (weight.params.scale < 0).all()
    assert weight.dequantize().unique().tolist() == [-0.5, 0.0, 0.5, 1.0]


def test_midrise_grids_have_as_many_numbers_on_either_side_and_suit_gaussians() -> None:
    grids = {
        rise: IntegerGrid(bits=2, group_size=192, symmetric=True, midrise=rise, scale="mse") for rise in (False, True)
    }
    weight = weights(64)
    values = rounded(grids[True], weight[:1]).dequantize()
    scale = float(values.abs().min()) * 2
    assert (values.unique() / scale).tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5])
    errors = {rise: (rounded(grid, weight).dequantize() - weight).square().mean() for rise, grid in grids.items()}
    share = errors[True] / weight.square().mean()
    assert share == pytest.approx(0.1175, abs=0.004)  # the best even quantizer of four levels: 0.1188 (Max, 1960)
    assert errors[True] < 0.88 * errors[False]
    assert grids[True].group_bits == 16


def test_asymmetric_grids_hold_zero_and_both_ends() -> None:
    grid = IntegerGrid(bits=4, group_size=16, symmetric=False, scale="minmax")
    row = torch.linspace(0.25, 1.0, 16)[None]
    values = rounded(grid, row).dequantize()
    assert values.max() == pytest.approx(1.0, abs=2e-3)
    assert grid.decode(torch.tensor([[[0]]], dtype=torch.uint8), rounded(grid, row).params) == 0


def test_real_zero_points_reach_both_ends_where_integer_ones_cut_one_off() -> None:
    row = torch.linspace(-1.0, 1.0, 64)[None]
    real = RealZeroGrid(bits=2).fake(row)
    assert real.unique().tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1], abs=5e-3)
    whole = IntegerGrid(bits=2, group_size=-1, scale="minmax").fake(row)
    assert float(whole.max()) < 0.7
    assert float(whole.min()) < -1.3  # a number that nothing is rounded to


def test_real_zero_points_are_stored_in_a_byte() -> None:
    weight = rounded(RealZeroGrid(bits=2, group_size=64), weights(8))
    arrays = weight.pack()
    assert arrays["zeros"].dtype == torch.uint8
    assert arrays["zeros"].numel() == 8 * 3
    assert weight.grid.group_bits / 64 == 0.375
    with pytest.raises(InputError, match="zeros"):
        weight.grid.unpack({name: array for name, array in arrays.items() if name != "zeros"}, (8, 192))


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_bit_streams_hold_any_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    from gyroquant.grids.bitpack import pack, packed_bytes, unpack

    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.uint8)
    stream = pack(codes, bits)
    assert stream.numel() == packed_bytes(rows * columns, bits) == -(-rows * columns * bits // 8)
    assert torch.equal(unpack(stream, bits, (rows, columns)), codes)


def test_bit_streams_beyond_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from gyroquant.grids import bitpack

    codes = torch.randint(0, 8, (11, 13), dtype=torch.uint8)
    whole = bitpack.pack(codes, 3)
    monkeypatch.setattr(bitpack, "_PIECE", 16)
    assert torch.equal(bitpack.pack(codes, 3), whole)
    assert torch.equal(bitpack.unpack(whole, 3, (11, 13)), codes)


def test_lsb_first_layout() -> None:
    from gyroquant.grids.bitpack import pack

    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]


def test_a_group_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"128 does not divide the 576 inputs of q_proj; use 16, 32, 64 or -1"):
        IntegerGrid(bits=4, group_size=128).group_of(576, "q_proj")


@pytest.mark.parametrize("grid", [IntegerGrid(bits=4, group_size=16), Fp4Grid(), Fp8Grid()], ids=str)
def test_weights_beyond_fp16_are_refused(grid: Grid) -> None:
    with pytest.raises(InputError, match="too large"):
        grid.fit(torch.full((1, 16), 1e8))


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipped_ranges_are_shorter_at_both_ends(symmetric: bool) -> None:
    weight = weights() + 0.05
    whole, clipped = (
        rounded(IntegerGrid(bits=8, group_size=64, symmetric=symmetric, scale="minmax", clip=clip), weight)
        for clip in (1.0, 0.75)
    )
    assert torch.allclose(clipped.params.scale, 0.75 * whole.params.scale, rtol=1e-3)
    assert (clipped.params.zero - whole.params.zero).abs().max() <= 1
    groups, values = weight.view(12, 3, 64), clipped.dequantize().view(12, 3, 64)
    low, high = (end(groups, -1, keepdim=True) * 0.75 for end in (torch.amin, torch.amax))
    inside = groups.clamp(low, high)
    if symmetric:
        assert (values.abs().amax(-1) <= 0.751 * groups.abs().amax(-1)).all()
    else:
        assert ((values - inside).abs() <= 1.01 * clipped.params.scale).all()


def test_searching_and_clipping_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="clip needs scale: minmax"):
        IntegerGrid(bits=4, group_size=16, clip=0.9)


@pytest.mark.parametrize(("grid", "bits"), [(Mxfp4Grid(), 4.25), (Nvfp4Grid(), 4.5 + 32 / (64 * 192))])
def test_true_bits_of_microscaling(grid: Grid, bits: float) -> None:
    assert stored_bits(rounded(grid, weights(64)).pack()) / (64 * 192) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(("grid", "bits"), [(Fp4Grid(), 4 + 16 / 192), (Fp8Grid(group_size=64), 8.25)])
def test_true_bits_of_floats(grid: Grid, bits: float) -> None:
    assert stored_bits(rounded(grid, weights(64)).pack()) / (64 * 192) == pytest.approx(bits, abs=1e-12)


def test_unknown_grids_are_refused() -> None:
    with pytest.raises(InputError, match="there is no grid"):
        grid_from({"grid": "octonion"})


def test_params_index_together() -> None:
    params = GroupParams(torch.ones(2, 3, 1), torch.zeros(2, 3, 1))
    assert params[:, 1].scale.shape == (2, 1)
