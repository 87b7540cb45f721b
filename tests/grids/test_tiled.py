"""Grids that code rows together: the best codes by brute force, and the errors that papers give for normal numbers."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import E8pGrid, Grid, GroupParams, TiledGrid, TrellisGrid
from gyroquant.grids.threads import WORTH_A_THREAD
from gyroquant.grids.viterbi import best_codes
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import Refine, output_error
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.grids import rounded, weights
from gyroquant.testing.solvers import problem


def normal_error(grid: Grid, rows: int = 512, columns: int = 192) -> float:
    """The mean squared error of a grid on normal numbers of variance 1."""
    weight = weights(rows, columns)
    error = (rounded(grid, weight).dequantize() - weight).square().mean()
    return float(error / weight.square().mean())


@pytest.mark.parametrize(
    ("grid", "error"),
    [
        (E8pGrid(), 0.0926),
        (TrellisGrid(bits=2, state_bits=8), 0.0876),
        (TrellisGrid(bits=2, state_bits=10), 0.0785),
        (TrellisGrid(bits=3, state_bits=10), 0.0213),
    ],
    ids=str,
)
def test_normal_numbers_have_the_error_of_the_literature(grid: Grid, error: float) -> None:
    """For sequences of 256 numbers. Those of 64 lose a little, because more of them are tied to their own start."""
    assert 0.98 * error < normal_error(grid) < 1.05 * error


def test_more_state_bits_are_better() -> None:
    errors = [normal_error(TrellisGrid(bits=2, state_bits=bits, sequence=128), 128, 64) for bits in (8, 10, 12)]
    assert errors == sorted(errors, reverse=True)


@given(st.integers(0, 10**6), st.sampled_from([(1, 3), (1, 4), (2, 4), (2, 3)]))
@settings(max_examples=40, deadline=None)
def test_no_path_to_the_same_state_is_cheaper(seed: int, size: tuple[int, int]) -> None:
    """Compared with all sequences of codes; the last codes of a sequence are the state before its first one."""
    bits, state_bits = size
    length = 10 if bits == 1 else 5
    random = np.random.default_rng(seed)
    numbers = random.standard_normal(2**state_bits).astype(np.float32)
    x = random.standard_normal((1, length)).astype(np.float32)
    r = random.uniform(0.1, 1, (1, length)).astype(np.float32)
    codes = best_codes(x, r, numbers, bits)[0]
    every = np.array(list(itertools.product(range(2**bits), repeat=length)))
    ages = range(-(-state_bits // bits))
    state = sum((np.roll(every, age, 1) << state_bits) >> (bits * (age + 1)) for age in ages)
    costs = (r**2 * (x - numbers[state]) ** 2).sum(1)
    mine = (every == codes).all(1).argmax()
    same_end = state[:, -1] == state[mine, -1]
    assert costs[mine] <= costs[same_end].min() * (1 + 1e-4) + 1e-6


def test_threads_give_the_same_codes() -> None:
    random = np.random.default_rng(0)
    x, r = random.standard_normal((80, 64), np.float32), np.ones((80, 64), np.float32)
    numbers = random.standard_normal(4096, np.float32)
    assert x.size * numbers.size > WORTH_A_THREAD
    assert (best_codes(x, r, numbers, 2) == best_codes(x, r, numbers, 2, threads=3)).all()


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_e8p_takes_the_nearest_of_all_its_points(seed: int) -> None:
    """By the error in the weights: rows have scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    x, grid = torch.randn(8, 1, generator=generator), E8pGrid()
    params = GroupParams(0.2 + torch.rand(8, 1, generator=generator), torch.zeros(8, 1))
    word = torch.arange(2**16)[None] >> (2 * torch.arange(8)[:, None]) & 3
    every = grid.decode(word.to(torch.uint8), params)
    assert len(every.T.unique(dim=0)) == 2**16
    best = (every - x).square().sum(0).min()
    mine = (grid.decode(grid.encode(x, params), params) - x).square().sum()
    assert float(mine) == pytest.approx(float(best), rel=1e-5)


def test_large_rows_count_more_than_small_ones() -> None:
    """The codes are those of the least error in the weights, not in units of the rows' scales."""
    weight = weights(512)
    scale = torch.logspace(0, -2, 64).repeat(8)[:, None, None]
    for grid in (TrellisGrid(bits=2, state_bits=8), E8pGrid()):
        params = grid.round_params(0.1 * scale, torch.zeros_like(scale))
        groups = weight.view(512, 1, 192) * scale
        weighted = grid.decode(grid.encode(groups, params), params)
        even = GroupParams(torch.ones_like(params.scale), params.zero)
        single = grid.decode(grid.encode(groups / params.scale, even), even) * params.scale
        assert (weighted - groups).square().sum() < 0.99 * (single - groups).square().sum()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="sequence: 48 or more"):
        load_recipe("gptq", ["weights.grid=trellis", "weights.bits=1", "weights.sequence=32"])
    with pytest.raises(RecipeError, match="codes 64 rows together, and down_proj has 96"):
        TrellisGrid().check_shape(96, 64, "down_proj")
    with pytest.raises(InputError, match="96 rows cannot be coded 64 together"):
        TrellisGrid().encode(torch.ones(96, 4), GroupParams(torch.ones(96, 1), torch.zeros(96, 1)))
    for change, reason in (
        ("weights.tune={iters: 2}", "leave tune out"),
        ("weights.guided={groups: 2}", "leave guided out"),
        ("activations={grid: e8p}", "not for activations"),
        ("kv_cache={grid: e8p}", "integer grids only"),
    ):
        with pytest.raises(RecipeError, match=reason):
            load_recipe("gptq", ["weights.grid=e8p", "weights.bits=2", change])


@pytest.mark.parametrize(("grid", "module"), [(TrellisGrid(), "viterbi"), (E8pGrid(), "lattice_search")], ids=str)
def test_without_the_compiler_it_only_decodes(grid: Grid, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = rounded(grid, weights(64))
    expected = weight.dequantize()
    monkeypatch.setitem(sys.modules, f"gyroquant.grids.{module}", None)  # as if numba were missing
    assert torch.equal(weight.dequantize(), expected)
    for call in (grid.check, lambda: rounded(grid, weights(64))):
        with pytest.raises(InputError, match=r'pip install "gyroquant\[vector-grids\]"'):
            call()


@pytest.mark.parametrize("grid", [TrellisGrid(bits=2, state_bits=8, sequence=16), E8pGrid()], ids=str)
def test_refinement_changes_whole_tiles_only_where_they_gain(grid: TiledGrid) -> None:
    weight, statistics = problem()
    before = RoundToNearest().solve(weight, grid)
    after = Refine(passes=1, scales=False, damp_percent=0).run(weight, before, statistics)
    for start in range(0, len(weight), grid.tile_rows):
        rows = slice(start, start + grid.tile_rows)
        errors = [output_error(weight[rows], w.dequantize()[rows], statistics) for w in (after, before)]
        assert errors[0] < errors[1]
