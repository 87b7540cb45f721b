"""Ternary types: the best scale, five codes in a byte, weights that are ternary already."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError
from gyroquant.grids import GroupParams, IntegerGrid, TernaryGrid
from gyroquant.grids.ternary import from_trits, to_trits
from gyroquant.testing.grids import rounded


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_every_byte_comes_back(seed: int) -> None:
    codes = torch.randint(0, 3, (7, 256), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).numpy()
    stream = to_trits(codes)
    assert stream.shape == (7, 52)
    assert (from_trits(stream) == codes).all()


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_no_other_scale_has_a_smaller_error(seed: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 256, generator=generator).abs().pow(power) * torch.randn(1, 256, generator=generator).sign()
    grid = TernaryGrid()
    error = (rounded(grid, weight).dequantize() - weight).square().sum()
    for scale in torch.linspace(0.01, float(weight.abs().max()), 300):
        params = GroupParams(scale.view(1, 1), torch.zeros(1, 1))
        assert error <= (grid.nearest(weight, params) - weight).square().sum() * (1 + 2e-5)


@pytest.mark.parametrize("grid", TernaryGrid.examples(), ids=lambda grid: grid.kind)
def test_ternary_weights_come_back(grid: TernaryGrid) -> None:
    codes = torch.randint(-1, 2, (6, 512), generator=torch.Generator().manual_seed(0))
    weight = codes * torch.logspace(-3, 0, 6).half().float()[:, None]
    assert torch.equal(rounded(grid, weight).dequantize(), weight)


def test_codes_that_are_none_of_the_three_are_refused() -> None:
    grid = TernaryGrid(kind="TQ2_0")
    arrays = rounded(grid, torch.randn(2, 256, generator=torch.Generator().manual_seed(0))).pack()
    with pytest.raises(InputError, match="cannot hold one of three numbers"):
        grid.unpack(arrays | {"codes": torch.full_like(arrays["codes"], 255)}, (2, 256))


def test_other_rows_get_two_bits() -> None:
    assert TernaryGrid().for_columns(576) == IntegerGrid(bits=2, group_size=64, symmetric=True)
    assert TernaryGrid().for_columns(512) == TernaryGrid()
