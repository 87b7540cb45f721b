"""The contract of grids."""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Grid, GroupParams, IntegerGrid, QuantizedWeight, grid_from, stored_bits
from gyroquant.models.stores.packed_description import PARTS
from gyroquant.testing.contract import Contract, refuses, require

COLUMNS = 192
GRID: Contract[Grid] = Contract("grid", Grid)


def weights(rows: int = 12, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Random weights of usual magnitude, shape (rows, columns)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def columns_for(grid: Grid) -> int:
    """A number of columns that every example of a grid divides; whole super-blocks."""
    together = grid.group_size * grid.super_block
    return COLUMNS if together < 0 or COLUMNS % together == 0 else together


def weights_for(grid: Grid, rows: int = 12) -> Tensor:
    """Random weights of usual magnitude, shape (rows or a few more, columns), that a grid can code."""
    return weights(_rows(grid, rows), columns_for(grid))


def rounded(grid: Grid, weight: Tensor) -> QuantizedWeight:
    """A weight, shape (rows, columns), rounded to nearest."""
    rows, columns = weight.shape
    grid = grid.with_tensor_scale(weight)
    groups = weight.view(rows, -1, grid.group_of(columns))
    params = grid.fit(groups)
    return QuantizedWeight(grid, grid.encode(groups, params).view(rows, columns), params)


def _rows(grid: Grid, rows: int) -> int:
    """At least this many rows, in whole tiles."""
    return -(-rows // grid.tile_rows) * grid.tile_rows


def _single(grid: Grid) -> bool:
    return grid.coded_singly


def _by_rows(grid: Grid) -> bool:
    """Whether each row is rounded by itself."""
    return grid.tile_rows == 1 and not grid.has_codebooks


def _in_rows(grid: Grid) -> bool:
    return grid.tile_rows > 1


def _same(params: GroupParams, others: GroupParams) -> bool:
    return torch.equal(params.scale, others.scale) and torch.equal(params.zero, others.zero)


def _every_code(grid: Grid) -> Tensor:
    return torch.arange(grid.code_count, dtype=torch.uint8)


@GRID.check()
def check_codes_fit_in_their_bits(grid: Grid) -> None:
    """Codes are uint8 below `code_count`."""
    codes = rounded(grid, weights_for(grid, 12)).codes
    require(codes.dtype == torch.uint8, f"codes are {codes.dtype}. Return uint8 from encode")
    require(
        int(codes.max()) < grid.code_count,
        f"encode gives the code {int(codes.max())}, but code_count is {grid.code_count}",
    )


@GRID.check()
def check_packing_loses_nothing(grid: Grid) -> None:
    """`unpack` returns the codes and scales that `pack` was given."""
    rows = _rows(grid, 7)
    weight = rounded(grid, weights_for(grid, rows))
    arrays = weight.pack()
    unknown = sorted(set(arrays) - set(PARTS))
    require(not unknown, f"pack gives the arrays {', '.join(unknown)}; use the names {', '.join(PARTS)}")
    codes, params = grid.unpack(arrays, (rows, columns_for(grid)))
    require(torch.equal(codes, weight.codes), "unpack gives other codes than pack was given")
    require(_same(params, weight.params), "unpack gives other scales or zero points than pack was given")
    bound = grid.with_stored_scale(arrays)
    again = QuantizedWeight(bound, codes, params)
    require(torch.equal(again.dequantize(), weight.dequantize()), "an unpacked weight decodes to other numbers")
    require(
        all(torch.equal(array, again.pack()[part]) for part, array in arrays.items()),
        "packing an unpacked weight gives other arrays",
    )


@GRID.check(when=lambda grid: grid.keeps_codes)
def check_decoded_weights_keep_their_codes(grid: Grid) -> None:
    """Numbers of the grid keep their codes when they are encoded again."""
    rows = _rows(grid, 12)
    weight = rounded(grid, weights_for(grid, rows))
    again = weight.dequantize().view(rows, -1, grid.group_of(columns_for(grid)))
    same = torch.equal(grid.encode(again, weight.params).view(rows, columns_for(grid)), weight.codes)
    require(same, "encode gives numbers of the grid other codes than they were decoded from")


@GRID.check(when=_single)
def check_encoding_takes_the_nearest_number(grid: Grid) -> None:
    """`encode` and `nearest` take the nearest of all numbers that `decode` gives."""
    size = grid.group_of(columns_for(grid))
    values = weights(3, size * grid.super_block).view(3, -1, size)
    bound = grid.with_tensor_scale(values)
    params = bound.fit(values)
    every = bound.decode(_every_code(grid).view(1, 1, -1), params)
    best = (values[..., None] - every[..., None, :]).abs().nan_to_num(torch.inf).amin(-1)
    numbers = bound.decode(bound.encode(values, params), params)
    require(torch.allclose((values - numbers).abs(), best, atol=1e-6), "encode does not take the nearest number")
    require(torch.equal(bound.nearest(values, params), numbers), "nearest differs from decode of encode")


@GRID.check(when=_in_rows)
def check_tiles_are_coded_by_themselves(grid: Grid) -> None:
    """The codes and numbers of a tile of rows do not depend on other tiles. `nearest` is decode of encode."""
    rows = grid.tile_rows
    weight = rounded(grid, weights(3 * rows))
    alone = rounded(grid, weights(3 * rows)[rows : 2 * rows])
    same = torch.equal(weight.codes[rows : 2 * rows], alone.codes)
    require(same, f"the codes of {rows} rows depend on other rows. Declare how many do in tile_rows")
    numbers = weight.dequantize()
    require(torch.equal(numbers[rows : 2 * rows], alone.dequantize()), "the numbers of a tile depend on other tiles")
    groups = weights(3 * rows).view(3 * rows, -1, grid.group_of(columns_for(grid)))
    same = torch.equal(grid.nearest(groups, weight.params).view(numbers.shape), numbers)
    require(same, "nearest differs from decode of encode")


@GRID.check(when=lambda grid: grid.tile_columns > 1)
def check_neighbours_are_coded_by_themselves(grid: Grid) -> None:
    """The codes of `tile_columns` weights do not depend on others. `decode` takes codes one by one, or whole tiles of a
    grid with codebooks.
    """
    length = grid.tile_columns
    weight = rounded(grid, weights_for(grid))
    grid = weight.grid
    groups = weights_for(grid).view(12, -1, grid.group_of(columns_for(grid)))
    alone = grid.encode(groups[..., :length].contiguous(), weight.params)
    same = torch.equal(alone, weight.codes.view(groups.shape)[..., :length])
    require(same, f"the codes of {length} weights depend on other weights. Declare how many do in tile_columns")
    numbers = weight.dequantize().view(groups.shape)
    part = slice(length, 2 * length) if grid.has_codebooks else slice(1, 2)
    single = grid.decode(weight.codes.view(groups.shape)[..., part], weight.params)
    require(torch.equal(single, numbers[..., part]), f"decode of {single.shape[-1]} codes differs from that of a group")
    require(torch.equal(grid.nearest(groups, weight.params), numbers), "nearest differs from decode of encode")


@GRID.check(when=lambda grid: grid.has_codebooks)
def check_codebooks_are_those_of_the_weight(grid: Grid) -> None:
    """Codebooks are fitted to the weight that a grid is bound to, and `fake` without them raises RecipeError. `range`
    covers all numbers.
    """
    weight = weights_for(grid, 64)
    own, other = rounded(grid, weight), rounded(grid.with_tensor_scale(weights(64, weight.shape[1], 1)), weight)
    error, limit = (float((w.dequantize() - weight).square().sum()) for w in (own, other))
    require(
        error < limit, f"the squared error with codebooks of another weight is {limit:.3g}, with its own {error:.3g}"
    )
    refuses(lambda: grid.fake(weight), RecipeError, "fake accepts it.", "weights only")
    numbers = own.dequantize().view(64, own.params.scale.shape[1], -1) / own.params.scale
    low, high = own.grid.range(own.params.zero)
    inside = bool((numbers >= low - 1e-5).all()) and bool((numbers <= high + 1e-5).all())
    require(inside, "range does not cover all numbers")


@GRID.check()
def check_quick_is_as_large_and_nearly_as_good(grid: Grid) -> None:
    """`quick` is a grid of the same size, and its error is at most a quarter larger."""
    weight = weights_for(grid, 64)
    own, quick = rounded(grid, weight), rounded(grid.quick, weight)
    require(own.bits == quick.bits, f"quick takes {quick.bits} bits, the grid {own.bits}")
    error, limit = (float((w.dequantize() - weight).square().sum()) for w in (quick, own))
    require(error <= 1.25 * limit, f"the squared error of quick is {error:.3g}, that of the grid {limit:.3g}")


@GRID.check(when=_in_rows)
def check_coding_rows_together_pays(grid: Grid) -> None:
    """Normal numbers have a smaller error than on the integer grid of the same bits without zero."""
    weight = weights_for(grid, 64)
    even = IntegerGrid(bits=grid.bits, group_size=grid.group_size, symmetric=True, midrise=True)
    error, limit = (float((rounded(g, weight).dequantize() - weight).square().sum()) for g in (grid, even))
    require(error < limit, f"its squared error is {error:.3g}, that of single codes {limit:.3g}")


@GRID.check(when=_in_rows)
def check_it_is_refused_where_rows_come_one_by_one(grid: Grid) -> None:
    """`fake` and shapes without whole tiles raise RecipeError."""
    refuses(lambda: grid.fake(weights(grid.tile_rows)), RecipeError, "fake accepts it.", "weights only")
    rows = grid.tile_rows + 1
    refuses(
        lambda: grid.check_shape(rows, columns_for(grid), "a weight"),
        RecipeError,
        "it accepts part of a tile.",
        "together",
    )


@GRID.check(when=_single)
def check_step_below_is_the_distance_to_the_next_number(grid: Grid) -> None:
    """`step_below` is the distance from a number to the next one towards zero, in units of the scale."""
    unit = GroupParams(torch.ones(1, 1), rounded(grid, weights_for(grid)).params.zero[0, :1])
    numbers = grid.decode(_every_code(grid)[None], unit)
    numbers = numbers[numbers.isfinite()].unique()  # sorted; some codes of fp8 are not numbers
    below = torch.where(numbers > 0, numbers - numbers.roll(1), numbers.roll(-1) - numbers)
    inside = (numbers != 0) & (below > 0)
    same = torch.allclose(grid.step_below(numbers)[inside], below[inside], rtol=1e-6)
    require(same, "step_below is not the distance to the next number towards zero")


@GRID.check(when=_by_rows)
def check_range_is_that_of_the_numbers(grid: Grid) -> None:
    """`range` gives the smallest and the largest number, in units of the scale."""
    zero = rounded(grid, weights_for(grid)).params.zero[:, :1].contiguous()
    numbers = grid.decode(_every_code(grid).expand(12, 1, -1), GroupParams(torch.ones_like(zero), zero))
    finite = numbers.where(numbers.isfinite(), 0)
    low, high = grid.range(zero)
    require(torch.equal(finite.amin(-1, keepdim=True), low), "range: the first is not the smallest number")
    require(torch.equal(finite.amax(-1, keepdim=True), high), "range: the second is not the largest number")


@GRID.check()
def check_scales_are_what_can_be_stored(grid: Grid) -> None:
    """Packing does not change scales from `fit` and `round_params`. `round_params` gives the nearest storable ones."""
    rows = _rows(grid, 12)
    weight = rounded(grid, weights_for(grid, rows))
    require(
        _same(weight.grid.round_params(weight.params.scale, weight.params.zero), weight.params),
        "round_params changes scales that fit gave: one of the two gives scales that cannot be stored",
    )
    wanted = weight.params.scale * 0.79
    moved = weight.grid.round_params(wanted, weight.params.zero + 0.3)
    _, params = grid.unpack(QuantizedWeight(weight.grid, weight.codes, moved).pack(), (rows, columns_for(grid)))
    require(_same(params, moved), "round_params gives scales or zero points that packing changes")
    difference = ((moved.scale - wanted).abs() - 2.0**-25).clamp(min=0)  # half a step of fp16's smallest numbers
    change = float((difference / wanted.abs()).max())
    limit = grid.scale_step / 2
    require(
        change <= limit * (1 + 1e-3),
        f"round_params changes a scale by {change:.2g} of it, but half of scale_step is {limit:.2g}. Take the nearest "
        "scale, or declare the relative step of stored scales",
    )


@GRID.check()
def check_a_saved_description_gives_the_same_grid(grid: Grid) -> None:
    """Settings that are saved as JSON and read give the same grid."""
    require(grid_from(grid.model_dump(mode="json")) == grid, "its settings, saved and read, give another grid")


@GRID.check()
def check_true_bits_are_those_of_the_arrays(grid: Grid) -> None:
    """`bits`, `group_bits` and `tensor_bits` add up to the bits of the stored arrays."""
    weight = rounded(grid, weights_for(grid, 64))
    stored, declared = stored_bits(weight.pack()), weight.bits
    require(stored == declared, f"pack stores {stored} bits, but bits, group_bits and tensor_bits add up to {declared}")


@GRID.check()
def check_a_bound_grid_stays_as_it_is(grid: Grid) -> None:
    """`with_tensor_scale` does not change a bound grid, and changes no setting."""
    bound = grid.with_tensor_scale(weights_for(grid))
    require(
        bound.with_tensor_scale(100 * weights_for(grid)) is bound,
        "with_tensor_scale changes a grid that is already bound",
    )
    require(bound.model_dump() == grid.model_dump(), "with_tensor_scale changes a setting")
    if grid.tile_rows == 1:
        same = torch.equal(bound.fake(weights_for(grid)), rounded(grid, weights_for(grid)).dequantize())
        require(same, "fake of a bound grid differs from rounding the weight that it was bound to")


@GRID.check(when=_by_rows)
def check_fake_rounds_every_row_by_itself(grid: Grid) -> None:
    """`fake` is fit, encode and decode for each row, in the dtype of its input. It does not change the input."""
    for dtype in (torch.float32, torch.bfloat16):
        x = (30 * weights_for(grid, 10)).to(dtype).view(2, 5, columns_for(grid))
        before = x.clone()
        alone = [rounded(grid, row[None].float()).dequantize()[0].to(dtype) for row in x.view(10, columns_for(grid))]
        result = grid.fake(x)
        require(torch.equal(x, before), "fake changes its input")
        require(result.dtype == dtype, f"fake returns {result.dtype} for {dtype}")
        require(torch.equal(result, torch.stack(alone).view(x.shape)), f"fake in {dtype} depends on other rows")
        transposed = grid.fake(x.transpose(0, 1))
        require(torch.equal(transposed, result.transpose(0, 1)), "fake depends on the memory layout of its input")


@GRID.check(when=lambda grid: grid.holds_zero)
def check_zeros_stay_zero(grid: Grid) -> None:
    """A grid with `holds_zero` rounds groups of zeros to zero."""
    mixed = torch.cat([weights_for(grid, 2), torch.zeros(2, columns_for(grid))])
    require(
        not rounded(grid, torch.zeros(2, columns_for(grid))).dequantize().any(),
        "zeros do not stay zero: set holds_zero",
    )
    require(
        not rounded(grid, mixed).dequantize()[2:].any(), "rows of zeros do not stay zero if other rows are not zero"
    )


@GRID.check(when=lambda grid: not grid.holds_zero)
def check_zeros_become_next_to_nothing(grid: Grid) -> None:
    """A grid without zero rounds groups of zeros to its smallest numbers, within the limits of fp16 scales."""
    largest = rounded(grid, torch.zeros(_rows(grid, 2), columns_for(grid))).dequantize().abs().max()
    require(float(largest) <= 2.0**-16, f"zeros become as large as {float(largest):.2g}")


@GRID.check(when=lambda grid: bool(grid.fits))
def check_its_fits_are_settings(grid: Grid) -> None:
    """Every declared fit is a valid setting, and the search is not worse than the range."""
    errors = {}
    for fit in grid.fits:
        chosen = grid.fitted_by(fit) if getattr(grid, "clip", 1) == 1 else grid
        again = grid_from(chosen.model_dump(mode="json"))
        require(
            again == chosen, f"the grid fitted by {fit} cannot be saved. Give it a setting scale that allows {fit!r}"
        )
        errors[fit] = float((rounded(chosen, weights_for(grid)).dequantize() - weights_for(grid)).square().sum())
    require(
        errors.get("mse", 0.0) <= errors.get("minmax", torch.inf) * 1.0001,
        "scales fitted by mse have a larger squared error than those fitted by minmax",
    )


@GRID.check()
def check_numbers_that_are_not_finite_are_refused(grid: Grid) -> None:
    """NaN and infinity raise InputError."""
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = weights_for(grid, 12)
        weight[3, 7] = value
        calls = {"fit": lambda w=weight: rounded(grid, w), "fake": lambda w=weight: grid.fake(w)}
        for name, call in list(calls.items())[: 2 if _by_rows(grid) else 1]:
            refuses(call, InputError, f"{name} accepts a weight of {value}.", "not finite")


@GRID.check()
def check_arrays_that_do_not_fit_are_refused(grid: Grid) -> None:
    """`unpack` raises InputError for arrays that are missing or of another size."""
    rows = _rows(grid, 2)
    arrays = rounded(grid, weights_for(grid, rows)).pack()
    short = arrays | {"codes": arrays["codes"][:-1]}
    refuses(
        lambda: grid.unpack(short, (rows, columns_for(grid))),
        InputError,
        "unpack accepts too few codes.",
        "cannot hold",
    )
    refuses(
        lambda: grid.unpack(arrays, (rows + 1, columns_for(grid))),
        InputError,
        "unpack accepts scales of another shape.",
    )
    missing = {"codes": arrays["codes"]}
    refuses(
        lambda: grid.unpack(missing, (rows, columns_for(grid))),
        InputError,
        "unpack accepts a weight without scales.",
        "missing",
    )


def check_grid(grid: Grid | type[Grid]) -> None:
    """Runs all checks of a grid, or of every example of a class of grids.

    Raises AssertionError, which names the class, what is wrong and what to do.
    """
    GRID.run(grid)
