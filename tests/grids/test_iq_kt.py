"""KT types: the points of the generator, the search for the nearest one, and errors like the program's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids import GroupParams, KtGrid, iq_kt
from gyroquant.grids.threads import WORTH_A_THREAD
from gyroquant.grids.tree_search import _SEEN, boxes_of, nearest_in_boxes
from gyroquant.testing.grids import rounded

GRIDS = KtGrid.examples()


def coordinates(place: int, count: int) -> list[int]:
    """Those of a point, by the rule of the generator."""
    state, found = place + 4096, []
    for _ in range(count):
        state = state * 0xCBAC1FED % 2**32
        found.append(sum(byte % 64 for byte in state.to_bytes(4, "little")) - 126)
    return found


def test_points_are_those_of_the_generator() -> None:
    for place in (0, 1, 777, 32767, 65535):
        point = coordinates(place, 8)
        assert iq_kt._points(2, False)[place].tolist() == point
        assert iq_kt._points(3, False)[place].tolist() == [abs(x) for x in point]
    assert iq_kt._points(4, False)[5].tolist() == coordinates(5, 4)
    assert iq_kt._points(4, True)[5].tolist() == coordinates(5 + 32768, 4)


def vectors(bits: int, count: int = 40) -> Tensor:
    """Normal numbers, some of them far away, in units of the scale."""
    generator, length = torch.Generator().manual_seed(0), GRIDS[bits - 2].tile_columns
    x = 35 * torch.randn(count, length, generator=generator) * 10 ** torch.linspace(-1, 1, count)[:, None]
    return x.abs() if bits == 3 else x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_point_is_nearer_than_the_one_from_the_boxes(bits: int) -> None:
    x, points = vectors(bits), iq_kt._points(bits, False)
    found, distance = nearest_in_boxes(x.numpy(), boxes_of(points.numpy()))
    every = (x[:, None] - points).square().sum(-1)
    own = every.gather(1, torch.from_numpy(found).long()[:, None])[:, 0]
    torch.testing.assert_close(own, every.amin(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(own, torch.from_numpy(distance), rtol=1e-5, atol=0)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
@settings(max_examples=20, deadline=None)
def test_a_quick_search_is_not_much_worse(seed: int, share: float) -> None:
    """The distance of its point is at most the root of 1 / share times as large."""
    points = np.random.default_rng(0).standard_normal((1024, 4)).astype(np.float32)
    x, boxes = np.random.default_rng(seed).standard_normal((20, 4)).astype(np.float32), boxes_of(points)
    quick, exact = nearest_in_boxes(x, boxes, share)[1], nearest_in_boxes(x, boxes)[1]
    assert (exact <= quick * (1 + 1e-5)).all()
    assert (quick * share <= exact * (1 + 1e-5)).all()


def test_boxes_hold_every_point_once() -> None:
    points = np.random.default_rng(0).standard_normal((2048, 8)).astype(np.float32)
    boxes = boxes_of(points)
    assert sorted(boxes.places.flatten()) == list(range(2048))
    for box, places in enumerate(boxes.places):
        assert np.array_equal(boxes.points[box], points[places].T)
        assert np.array_equal(boxes.low[:, box], points[places].min(0))
        assert np.array_equal(boxes.high[:, box], points[places].max(0))


def test_threads_find_the_same_points() -> None:
    points = np.random.default_rng(0).standard_normal((4096, 4)).astype(np.float32)
    x, boxes = np.random.default_rng(1).standard_normal((20000, 4)).astype(np.float32), boxes_of(points)
    assert x.size * points.shape[0] // _SEEN > WORTH_A_THREAD
    one, three = (nearest_in_boxes(x, boxes, 1.0, threads) for threads in (1, 3))
    assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_codes_are_the_same_without_the_compiler(grid: KtGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = vectors(grid.bits, 16).view(1, 1, -1)
    for zero in (0.0, -4.0) if grid.bits == 4 else (0.0,):
        params = GroupParams(torch.full((1, 1, 1), 1.3), torch.full((1, 1, 1), zero))
        codes = grid.encode(weights, params)
        assert torch.equal(grid.decode(codes, params), grid.nearest(weights, params))
        with monkeypatch.context() as without:
            without.setattr(iq_kt, "has_compiler", lambda: False)
            assert torch.equal(grid.encode(weights, params), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type_name)
def test_infinite_numbers_and_nan_do_no_harm(grid: KtGrid) -> None:
    steps = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0, -0.0, 1.0, -1.0] * 4)[None]
    codes, distance = grid._search(steps, torch.zeros(1, 1))
    assert int(codes.max()) < grid.code_count
    assert bool(distance.isfinite().all())


@pytest.mark.parametrize(  # the mean squared error of ik_llama.cpp's own quantizer on these numbers, rows of 2048
    ("bits", "theirs"), [(2, 0.0869), (3, 0.0235), (4, 0.00767)]
)
def test_errors_are_below_those_of_the_program(bits: int, theirs: float) -> None:
    weight = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0))
    assert float((rounded(KtGrid(bits=bits), weight).dequantize() - weight).square().mean()) < 0.99 * theirs


def test_part_of_a_point_is_refused() -> None:
    with pytest.raises(InputError, match="IQ2_KT codes 8 weights together, not 4"):
        KtGrid().encode(torch.ones(2, 4), GroupParams(torch.ones(2, 1), torch.zeros(2, 1)))
