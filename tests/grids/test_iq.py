"""The search of points of IQ types, and of the numbers of IQ4_XS."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyroquant.grids import GroupParams, IqGrid, KQuantGrid, iq
from gyroquant.grids.lookup import iq4_nl
from gyroquant.grids.point_search import largest, nearest_points
from gyroquant.grids.threads import WORTH_A_THREAD

GRIDS = IqGrid.examples()


def vectors(seed: int, rows: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 256, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)


def points(grid: IqGrid) -> Tensor:
    return iq._points(grid.type_name).points


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_magnitudes_are_the_nearest_point(grid: IqGrid) -> None:
    """Positive weights have no sign to change."""
    book, weights = points(grid), vectors(0).abs()
    params = GroupParams(weights.mean(1, keepdim=True) / book.mean(), torch.zeros(64, 1))
    found = (grid.nearest(weights, params) / params.scale - weights / params.scale).square()
    parts = (weights / params.scale).view(-1, book.shape[1])
    least = (parts[:, None] - book).square().sum(-1).amin(1)
    torch.testing.assert_close(found.view(parts.shape).sum(1), least, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_codes_are_the_same_without_the_compiler(grid: IqGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = vectors(1).unflatten(1, (-1, grid.group_size))
    params = grid.fit(groups)
    codes, numbers = grid.encode(groups, params), grid.nearest(groups, params)
    assert torch.equal(grid.decode(codes, params), numbers)
    monkeypatch.setattr(iq, "has_compiler", lambda: False)
    assert torch.equal(grid.encode(groups, params), codes)
    assert torch.equal(grid.nearest(groups, params), numbers)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_scales_are_as_good_as_those_of_a_search_of_all_points(grid: IqGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)).unflatten(1, (-1, grid.group_size))
    quick = grid.fit(groups)
    monkeypatch.setattr(iq, "has_compiler", lambda: False)
    errors = [(grid.nearest(groups, params) - groups).square().sum() for params in (quick, grid.fit(groups))]
    assert errors[0] < 1.001 * errors[1]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_infinite_numbers_and_nan_do_no_harm(grid: IqGrid) -> None:
    steps = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0, -0.0, 1.0, -1.0] * 32)[None]
    for quick in (False, True):
        index, _, _ = grid._search(steps, quick)
        assert 0 <= int(index.min()) <= int(index.max()) < len(points(grid))


def test_threads_give_the_same_points() -> None:
    book = points(GRIDS[0])
    x = np.random.default_rng(0).standard_normal((5000, 8), np.float32) * 20
    place, near = np.zeros(1, np.int32), book.T.contiguous().numpy()[None]
    assert x.size * len(book) > WORTH_A_THREAD
    offset = (book.square().sum(1) / 2).numpy()[None]
    one, three = (nearest_points(x, place, near, offset, True, threads) for threads in (1, 3))
    assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


@given(st.integers(3, 10), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_largest_number_is_found(log: int, seed: int) -> None:
    """Also among equal ones."""
    tree = np.random.default_rng(seed).integers(-50, 50, 2 << log).astype(np.float32)
    scores = tree[: 1 << log].copy()
    assert scores[largest(tree, len(scores))] == scores.max()


def test_iq4_xs_takes_the_nearest_number() -> None:
    table = iq4_nl()
    steps = torch.cat([torch.linspace(-300, 300, 4801), torch.tensor([-torch.inf, torch.inf])])
    one = GroupParams(torch.ones(1), torch.zeros(1))
    numbers = KQuantGrid(four_bits="IQ4_XS").nearest(steps, one)
    finite = slice(0, -2)
    assert torch.equal((numbers - steps).abs()[finite], (steps[finite, None] - table).abs().amin(1))
    assert numbers[-2:].tolist() == [table[0], table[-1]]
