"""Rows of different widths: the same numbers as rows on integer grids of their own, and stored bits that add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gyroquant.errors import InputError
from gyroquant.grids import IntegerGrid, MixedRowsGrid, QuantizedWeight, stored_bits
from gyroquant.testing.grids import rounded, weights

KINDS = [
    MixedRowsGrid(bits=4, narrower=(3, 2), group_size=64),
    MixedRowsGrid(bits=3, narrower=(2,), group_size=-1, symmetric=True, midrise=True),
    MixedRowsGrid(bits=8, narrower=(1, 4), group_size=16, symmetric=True, scale="minmax"),
]


def mixed(grid: MixedRowsGrid, weight: torch.Tensor, places: torch.Tensor) -> QuantizedWeight:
    """A weight, shape (rows, columns), with every row rounded to nearest on the grid of its width."""
    grid = grid.with_tensor_scale(weight)
    parts = [(index, rounded(kind, weight[index])) for kind, index in _rows(grid, places) if len(index)]
    return grid.joined(parts)


def _rows(grid: MixedRowsGrid, places: torch.Tensor) -> list[tuple[IntegerGrid, torch.Tensor]]:
    return [(kind, (places == place).nonzero()[:, 0]) for place, kind in enumerate(grid.kinds)]


@pytest.mark.parametrize("grid", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_rows_are_those_of_integer_grids_and_packing_keeps_them(grid: MixedRowsGrid, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 19))
    places = torch.tensor(data.draw(st.lists(st.integers(0, len(grid.widths) - 1), min_size=count, max_size=count)))
    matrix = weights(count) * data.draw(st.sampled_from([1.0, 1e-9, 1e7]))
    weight = mixed(grid, matrix, places)
    for kind, index in _rows(weight.grid, places):  # type: ignore[arg-type]
        if len(index):
            assert torch.equal(weight.dequantize()[index], rounded(kind, matrix[index]).dequantize())
    assert torch.equal(grid.places(weight.params), places)
    arrays = weight.pack()
    bound = grid.with_stored_scale(arrays)
    codes, params = bound.unpack(arrays, tuple(matrix.shape))  # type: ignore[arg-type]
    again = QuantizedWeight(bound, codes, params)
    assert torch.equal(codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert all(torch.equal(array, again.pack()[part]) for part, array in arrays.items())
    assert 0 <= stored_bits(arrays) - weight.bits <= grid.most_padding
    assert torch.equal(weight.grid.encode(_groups(weight), params).view(codes.shape), codes)


def _groups(weight: QuantizedWeight) -> torch.Tensor:
    return weight.dequantize().view(len(weight.codes), weight.params.scale.shape[1], -1)


@pytest.mark.parametrize("grid", KINDS)
def test_every_function_is_that_of_the_row_s_own_grid(grid: MixedRowsGrid) -> None:
    places = torch.arange(12) % len(grid.widths)
    weight, wanted = mixed(grid, weights(12), places), weights(12, seed=1)
    values, params = wanted.view(12, weight.params.scale.shape[1], -1), weight.params
    ends, low, high = grid.range(params.zero), torch.full_like(params.scale, 0.8), torch.full_like(params.scale, 0.9)
    moved = grid.round_params(*grid.rescale(params, low, high))
    assert torch.equal(grid.places(moved), places)
    for place, (kind, index) in enumerate(_rows(grid, places)):
        own = grid.part(weight, place).params
        assert torch.equal(grid.encode(values, params)[index], kind.encode(values[index], own))
        assert torch.equal(grid.nearest(values, params)[index], kind.nearest(values[index], own))
        assert all(torch.equal(a[index], b) for a, b in zip(ends, kind.range(own.zero), strict=True))
        storable = kind.round_params(*kind.rescale(own, low[index], high[index]))
        assert torch.equal(grid.part(QuantizedWeight(grid, weight.codes, moved), place).params.zero, storable.zero)
        assert torch.equal(moved.scale[index], storable.scale)


def test_sizes_and_settings() -> None:
    grid = MixedRowsGrid.of(IntegerGrid(bits=7, group_size=64), [4, 2, 3, 2])
    assert grid.widths == (2, 3, 4)
    assert grid.row_sizes(128) == tuple(width * 128 + 2 * (16 + width) + 2 for width in (2, 3, 4))
    for narrower in ((4,), (2, 2), ()):
        with pytest.raises(ValidationError):
            MixedRowsGrid(bits=4, narrower=narrower)


def test_damaged_widths_are_refused() -> None:
    grid = KINDS[0]
    arrays = mixed(grid, weights(4), torch.tensor([0, 1, 2, 2])).pack()
    with pytest.raises(InputError, match="width 3 of 3"):
        grid.unpack(arrays | {"choices": torch.tensor([255], dtype=torch.uint8)}, (4, 192))
    with pytest.raises(InputError, match="cannot hold codes"):
        grid.unpack(arrays | {"choices": torch.tensor([0], dtype=torch.uint8)}, (4, 192))
