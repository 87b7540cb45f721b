"""What every grid must satisfy. A new kind of grid adds its settings to GRIDS."""

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
    QuantizedWeight,
    grid_from,
    stored_bits,
)

INTEGERS = [
    IntegerGrid(bits=bits, group_size=size, symmetric=symmetric, scale=scale)
    for bits in range(1, 9)
    for size, symmetric, scale in ((16, False, "minmax"), (64, True, "mse"), (-1, False, "mse"), (32, True, "minmax"))
]
GRIDS: list[Grid] = [
    *INTEGERS,
    IntegerGrid(bits=4, group_size=64, scale="minmax", clip=0.9),
    *(IntegerGrid(bits=bits, group_size=-1, symmetric=True, midrise=True) for bits in (1, 2, 3)),
    *(Fp4Grid(group_size=size, scale=scale) for size, scale in ((-1, "mse"), (-1, "minmax"), (64, "mse"))),
    *(Fp8Grid(group_size=size, format=form) for size, form in ((-1, "e4m3"), (32, "e4m3"), (-1, "e5m2"))),
    *(Mxfp4Grid(scale_rounding=rounding) for rounding in ("floor", "round", "ceil", "mse")),
    *(Nvfp4Grid(scale=scale) for scale in ("minmax", "mse")),
]


def rounded(grid: Grid, weight: torch.Tensor) -> QuantizedWeight:
    rows, columns = weight.shape
    grid = grid.bind(weight)
    groups = weight.view(rows, -1, grid.group_of(columns))
    params = grid.fit(groups)
    return QuantizedWeight(grid, grid.encode(groups, params).view(rows, columns), params)


def weights(rows: int = 12, columns: int = 192, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_every_grid_is_tested() -> None:
    assert {grid.grid for grid in GRIDS} == set(Grid.kinds)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestContract:
    def test_codes_fit_in_their_bits(self, grid: Grid) -> None:
        assert int(rounded(grid, weights()).codes.max()) < 2**grid.bits

    def test_packing_loses_nothing(self, grid: Grid) -> None:
        weight = rounded(grid, weights(7))
        codes, params = grid.unpack(weight.pack(), (7, 192))
        assert torch.equal(codes, weight.codes)
        assert torch.equal(params.scale, weight.params.scale)
        assert torch.equal(params.zero, weight.params.zero)
        bound = grid.bound_by(weight.pack())
        assert torch.equal(QuantizedWeight(bound, codes, params).dequantize(), weight.dequantize())
        again = QuantizedWeight(bound, codes, params).pack()
        assert all(torch.equal(array, again[part]) for part, array in weight.pack().items())

    def test_scales_are_stored_exactly(self, grid: Grid) -> None:
        weight = rounded(grid, weights())
        if weight.pack()["scales"].dtype == torch.float16:
            assert torch.equal(weight.params.scale, weight.params.scale.half().float())
        again = QuantizedWeight(weight.grid, *grid.unpack(weight.pack(), (12, 192))).pack()
        assert all(torch.equal(array, again[part]) for part, array in weight.pack().items())

    def test_decoded_weights_are_their_own_nearest_codes(self, grid: Grid) -> None:
        weight = rounded(grid, weights())
        again = weight.dequantize().view(12, -1, grid.group_of(192))
        assert torch.equal(grid.encode(again, weight.params).view(12, 192), weight.codes)

    def test_gaps_are_those_to_the_next_number_towards_zero(self, grid: Grid) -> None:
        one = GroupParams(torch.ones(1, 1), rounded(grid, weights()).params.zero[0, :1])
        codes = torch.arange(2**grid.bits, dtype=torch.uint8)[None]
        numbers = grid.decode(codes, one)
        numbers = numbers[numbers.isfinite()].unique()  # sorted; some codes of fp8 are no numbers
        below = torch.where(numbers > 0, numbers - numbers.roll(1), numbers.roll(-1) - numbers)
        inside = (numbers != 0) & (below > 0)
        assert torch.equal(grid.gap(numbers)[inside], below[inside])

    def test_the_span_is_that_of_the_numbers(self, grid: Grid) -> None:
        params = rounded(grid, weights()).params
        zero = params.zero[:, :1].contiguous()
        codes = torch.arange(2**grid.bits, dtype=torch.uint8).expand(12, 1, -1)
        numbers = grid.decode(codes, GroupParams(torch.ones_like(zero), zero))
        low, high = grid.span(zero)
        finite = numbers.where(numbers.isfinite(), 0)
        assert torch.equal(finite.amin(-1, keepdim=True), low)
        assert torch.equal(finite.amax(-1, keepdim=True), high)

    def test_what_is_stored_is_storable_and_near_what_was_asked_for(self, grid: Grid) -> None:
        weight = rounded(grid, weights())
        same = weight.grid.storable(weight.params.scale, weight.params.zero)
        assert torch.equal(same.scale, weight.params.scale)
        assert torch.equal(same.zero, weight.params.zero)
        moved = weight.grid.storable(weight.params.scale * 0.79, weight.params.zero + 0.3)
        kept = QuantizedWeight(weight.grid, weight.codes, moved)
        _, params = grid.unpack(kept.pack(), (12, 192))
        assert torch.equal(params.scale, moved.scale)
        assert torch.equal(params.zero, moved.zero)
        coarse = 0.42 if grid.grid == "mxfp4" else 0.07  # the next power of two, or of 8 numbers in a binade
        assert ((moved.scale / (weight.params.scale * 0.79)).log().abs() < coarse).all()

    def test_encoding_takes_the_nearest_number(self, grid: Grid) -> None:
        values = weights(3, grid.group_of(192)).view(3, 1, -1)
        params = grid.bind(values).fit(values)
        every = grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8).view(1, 1, -1), params)
        nearest = (values[..., None] - every[..., None, :]).abs().nan_to_num(torch.inf).amin(-1)
        taken = (values - grid.decode(grid.encode(values, params), params)).abs()
        assert torch.allclose(taken, nearest, atol=1e-6)

    def test_saved_description_gives_the_same_grid(self, grid: Grid) -> None:
        assert grid_from(grid.model_dump(mode="json")) == grid

    def test_true_bits_are_what_lies_in_the_file(self, grid: Grid) -> None:
        arrays = rounded(grid, weights(64)).pack()
        expected = grid.bits + grid.group_bits / grid.group_of(192) + (32 / (64 * 192) if "global" in arrays else 0)
        assert stored_bits(arrays) / (64 * 192) == pytest.approx(expected, abs=1e-9)

    def test_binding_twice_is_binding_once(self, grid: Grid) -> None:
        bound = grid.bind(weights())
        assert bound.bind(100 * weights()) is bound
        assert bound.model_dump() == grid.model_dump()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fake_is_fitted_encoded_and_decoded(self, grid: Grid, dtype: torch.dtype) -> None:
        x = (30 * weights(10, 192)).to(dtype).view(2, 5, 192)
        before = x.clone()
        # Every row by itself: tokens know nothing of each other.
        alone = torch.stack([rounded(grid, row[None].float()).dequantize()[0].to(dtype) for row in x.view(10, 192)])
        assert torch.equal(grid.fake(x), alone.view(2, 5, 192))
        assert grid.fake(x).dtype == dtype
        assert torch.equal(x, before)
        turned = x.transpose(0, 1)
        assert torch.equal(grid.fake(turned), grid.fake(x).transpose(0, 1))

    def test_a_bound_grid_fakes_with_the_scale_it_knows(self, grid: Grid) -> None:
        weight = weights()
        assert torch.equal(grid.bind(weight).fake(weight), rounded(grid, weight).dequantize())

    def test_groups_of_zeros_stay_zero(self, grid: Grid) -> None:
        """Or as near as grids come that have no zero: the smallest number of fp16."""
        zeroless = isinstance(grid, IntegerGrid) and grid.symmetric and (grid.midrise or grid.bits == 1)
        least = 2**-24 * (2**grid.bits - 1) / 2 if zeroless else 0
        assert rounded(grid, torch.zeros(2, 192)).dequantize().abs().max() <= least
        some = torch.cat([weights(2), torch.zeros(2, 192)])
        assert rounded(grid, some).dequantize()[2:].abs().max() <= least

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_numbers_that_are_not_finite_are_refused(self, grid: Grid, value: float) -> None:
        weight = weights()
        weight[3, 7] = value
        with pytest.raises(InputError, match="not finite"):
            rounded(grid, weight)
        with pytest.raises(InputError, match="not finite"):
            grid.fake(weight)

    def test_arrays_that_do_not_fit_are_refused(self, grid: Grid) -> None:
        arrays = rounded(grid, weights(2, 64)).pack()
        with pytest.raises(InputError, match="cannot hold"):
            grid.unpack(arrays | {"codes": arrays["codes"][:-1]}, (2, 64))
        with pytest.raises(InputError, match="scales of shape"):
            grid.unpack(arrays, (3, 64))
        with pytest.raises(InputError, match="array of scales of a rounded weight is missing"):
            grid.unpack({"codes": arrays["codes"]}, (2, 64))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_scales_are_never_worse(bits: int, symmetric: bool) -> None:
    errors = {}
    for scale in ("minmax", "mse"):
        grid = IntegerGrid(bits=bits, group_size=64, symmetric=symmetric, scale=scale)
        errors[scale] = (rounded(grid, weights(64)).dequantize() - weights(64)).square().view(64, 3, 64).sum(-1)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < 0.97 * errors["minmax"].sum()


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
    with pytest.raises(InputError, match="unknown grid"):
        grid_from({"grid": "octonion"})


def test_params_index_together() -> None:
    params = GroupParams(torch.ones(2, 3, 1), torch.zeros(2, 3, 1))
    assert params[:, 1].scale.shape == (2, 1)
