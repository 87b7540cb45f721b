"""The forms in which graphs hold matrices: grids between two codes in whole steps, and matrices of one grid as one."""

from __future__ import annotations

import pytest
import torch

from gyroquant.formats.operations import in_whole_steps, joined_rows
from gyroquant.grids import IntegerGrid, QuantizedWeight


def rounded(bits: int, seed: int = 0, size: float = 1.0, **settings: bool) -> QuantizedWeight:
    grid = IntegerGrid(bits=bits, group_size=16, symmetric=True, **settings)
    groups = size * torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(seed))
    params = grid.fit(groups)
    return QuantizedWeight(grid, grid.encode(groups, params).view(6, 32), params)


@pytest.mark.parametrize(("bits", "stored"), [(1, 2), (3, 4), (5, 8), (7, 8)])
def test_half_steps_become_whole_in_a_wider_type(bits: int, stored: int) -> None:
    weight = rounded(bits, midrise=True)
    form = in_whole_steps(weight, stored)
    assert isinstance(form.grid, IntegerGrid)
    assert (form.grid.bits, form.grid.midrise) == (bits + 1, False)
    assert int(form.codes.max()) < 2 ** (bits + 1) <= 2**stored
    assert torch.equal(form.dequantize(), weight.dequantize())
    assert in_whole_steps(form, stored) is form


def test_other_matrices_stay_as_they_are() -> None:
    for weight, stored in ((rounded(2, midrise=True), 2), (rounded(3), 4), (rounded(4, midrise=True), 4)):
        assert in_whole_steps(weight, stored) is weight
    tiny = rounded(3, size=1e-6, midrise=True)  # fp16 does not hold half of an odd smallest number
    tiny.params.scale.fill_(3 * 2.0**-24)
    assert in_whole_steps(tiny, 4) is tiny


def test_rows_of_several_matrices_are_one_after_the_other() -> None:
    a, b = rounded(4, 1), rounded(4, 2)
    assert torch.equal(joined_rows([a, b]).dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
