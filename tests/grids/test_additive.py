"""Additive codebooks: their errors, searches and bits, and how refinement fits them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import AdditiveGrid, GroupParams
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import Refine, output_error
from gyroquant.rounding.base import PreparedWeight
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps.codebooks import best_codebooks
from gyroquant.testing.grids import rounded, weights
from gyroquant.testing.solvers import problem

SMALL = AdditiveGrid(codebook_bits=4)


def every_sum(grid: AdditiveGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of all words of a grid, and the vectors that they stand for at scale 1, both (words, 8)."""
    word = torch.arange(2 ** (8 * grid.bits))
    place = grid.codebook_bits * torch.arange(grid.codebooks)
    codes = grid.codes((word[:, None, None] >> place) & (2**grid.codebook_bits - 1))
    ones = torch.ones(len(word), 1)
    return codes, grid.decode(codes, GroupParams(ones, 0 * ones))


def test_a_weight_is_the_sum_of_one_entry_of_each_codebook() -> None:
    weight = rounded(SMALL, weights())
    grid = weight.grid
    assert isinstance(grid, AdditiveGrid)
    assert grid.books.shape == (4, 16, 8)
    entries = grid.entries(weight.codes)
    assert entries.shape == (12, 24, 4)
    assert torch.equal(grid.codes(entries), weight.codes)
    for row, vector in ((0, 0), (3, 7), (11, 23)):
        expected = sum(grid.books[m, entries[row, vector, m]] for m in range(4)) * weight.params.scale[row, 0]
        assert torch.allclose(weight.dequantize()[row, 8 * vector : 8 * vector + 8], expected, atol=1e-7)


def test_bytes_are_the_entries_one_after_another() -> None:
    """With codebooks of 256 entries, so that other programs can read them."""
    weight = rounded(AdditiveGrid(), weights())
    arrays = weight.pack()
    assert isinstance(weight.grid, AdditiveGrid)
    assert torch.equal(arrays["codes"].long(), weight.grid.entries(weight.codes).flatten())
    assert arrays["codebooks"].dtype == arrays["scales"].dtype == torch.float16


def test_codebooks_are_counted() -> None:
    weight = rounded(AdditiveGrid(), weights(64, 192))
    assert weight.bits == 2 * 64 * 192 + 16 * 64 + 2 * 256 * 8 * 16


def test_weights_of_few_vectors_come_back() -> None:
    """Sixteen different vectors, each with its own entry."""
    vectors = weights(16, 8)
    weight = vectors[torch.randint(0, 16, (4, 24), generator=torch.Generator().manual_seed(1))].flatten(1)
    weight = weight / weight.square().mean(1, keepdim=True).sqrt()
    result = rounded(AdditiveGrid(bits=1), weight).dequantize()
    assert torch.allclose(result, weight, atol=4e-3)


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_the_search_is_close_to_the_best_of_all_sums(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = SMALL.with_books(torch.randn(4, 16, 8, generator=generator) / torch.arange(1, 5)[:, None, None])
    x, scale = torch.randn(32, 8, generator=generator), torch.ones(32, 1)
    _, sums = every_sum(grid)
    best = torch.cdist(x, sums).square().amin(1).sum()
    found = (grid.nearest(x, GroupParams(scale, 0 * scale)) - x).square().sum()
    assert best <= found * (1 + 1e-5)
    assert found < 1.25 * best


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_a_search_by_second_moments_lowers_their_error(seed: int) -> None:
    """Never below the best of all sums, and no entry alone can be bettered where it stops by itself."""
    generator = torch.Generator().manual_seed(seed)
    grid = AdditiveGrid(bits=1, codebook_bits=4).with_books(torch.randn(2, 16, 8, generator=generator))
    mix = torch.randn(8, 8, generator=generator)
    h = mix @ mix.T + 0.01 * torch.eye(8)
    x, scale = torch.randn(20, 8, generator=generator), 0.5 + torch.rand(20, 1, generator=generator)
    params = GroupParams(scale, 0 * scale)
    errors = {}
    codes = grid.encode(x, params)
    for sweeps in range(20):
        rest = grid.decode(codes, params) - x
        errors[sweeps] = ((rest @ h) * rest).sum(1)
        codes = grid.encode_by(x, params, h, codes)
    steps = [later - earlier for earlier, later in zip(list(errors.values()), list(errors.values())[1:], strict=False)]
    assert all(bool((step <= 1e-4).all()) for step in steps)
    _, sums = every_sum(grid)
    rest = scale[:, None] * sums - x[:, None]
    every = torch.einsum("nwi,ij,nwj->nw", rest, h, rest)
    assert bool((every.amin(1) <= errors[19] * (1 + 1e-4) + 1e-5).all())
    entries = grid.entries(codes)[:, 0]
    words = (entries << torch.tensor([0, 4])).sum(1)
    for m in range(2):
        for entry in range(16):
            other = words - (entries[:, m] << 4 * m) + (entry << 4 * m)
            assert bool((every.gather(1, other[:, None])[:, 0] >= errors[19] - 1e-3).all())


def test_codebooks_reach_the_least_squares_solution() -> None:
    """Compared with all normal equations, solved at once."""
    weight, statistics = problem(rows=64)
    grid = AdditiveGrid(bits=1, codebook_bits=4).with_tensor_scale(weight)
    start = RoundToNearest().solve(weight, grid)
    h = statistics.second_moments / statistics.count + 0.01 * torch.eye(192)
    books = grid.books.double()

    def numbers(change: torch.Tensor) -> torch.Tensor:
        entries = grid.entries(start.codes)
        total = sum(change[m][entries[..., m]] for m in range(2))
        assert isinstance(total, torch.Tensor)
        return (total * start.params.scale.double()).flatten(1)

    def error(rest: torch.Tensor) -> float:
        return float(((rest @ h.double()) * rest).sum())

    basis = torch.eye(2 * 16 * 8, dtype=torch.float64).view(-1, 2, 16, 8)
    root = torch.linalg.cholesky(h.double())
    system = torch.stack([(numbers(one) @ root).flatten() for one in basis], 1)
    rest = weight.double() - numbers(books)
    solution = torch.linalg.lstsq(system, (rest @ root).flatten()[:, None], driver="gelsd").solution.view_as(books)
    least, before = error(rest - numbers(solution)), error(rest)
    slope = (weight - start.dequantize()) @ h
    found = best_codebooks(grid, start.codes, start.params, slope, h)
    gained = before - error(weight.double() - numbers(found.books.double()))
    assert gained > 0.97 * (before - least) > 0


def test_refinement_fits_codebooks_unless_others_share_them() -> None:
    weight, statistics = problem(rows=24)
    grid = SMALL.with_tensor_scale(weight)
    start = RoundToNearest().solve(weight, grid, statistics)
    state = PreparedWeight("a weight", weight, statistics, None, grid, start)
    own = Refine().apply(state)
    shared = Refine().apply(PreparedWeight("a weight", weight, statistics, None, grid, start, shares_grid=True))
    only_codes = Refine(scales=False).apply(state)
    errors = []
    for done in (own, shared, only_codes):
        assert done.rounded is not None
        assert done.rounded.grid is done.grid
        errors.append(output_error(weight, done.rounded.dequantize(), statistics))
    assert shared.grid is grid
    assert only_codes.grid is grid
    assert own.grid is not grid
    assert errors[0] < 0.95 * errors[1] <= 0.95 * errors[2]
    assert errors[2] < 0.7 * output_error(weight, start.dequantize(), statistics)


def test_refinement_ends_when_a_pass_gains_little() -> None:
    weight, statistics = problem(rows=16)
    start = RoundToNearest().solve(weight, SMALL.with_tensor_scale(weight), statistics)
    once, soon, late = (
        Refine(**options).run(weight, start, statistics)
        for options in ({"passes": 1}, {"passes": 30, "tolerance": 0.9}, {"passes": 30, "tolerance": 0.05})
    )
    assert torch.equal(once.codes, soon.codes)
    errors = [output_error(weight, done.dequantize(), statistics) for done in (soon, late)]
    assert errors[1] < 0.95 * errors[0]
    recipe = load_recipe("aqlm")
    assert recipe.weights.refine == Refine(passes=50, tolerance=0.01)
    assert recipe.to_dict()["weights"]["refine"]["tolerance"] == 0.01
    assert "tolerance" not in load_recipe("quip-sharp").to_dict()["weights"]["refine"]


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"codebook_bits 12 does not divide the 16 bits .*: use 4, 8, 16"):
        AdditiveGrid(bits=2, codebook_bits=12)
    with pytest.raises(ValidationError, match="a multiple of 8 weights, not 20"):
        AdditiveGrid(group_size=20)
    with pytest.raises(RecipeError, match="8 weights of a row together, and down_proj has 100 inputs"):
        AdditiveGrid().check_shape(64, 100, "down_proj")
    with pytest.raises(InputError, match=r"call with_tensor_scale\(weight\) first"):
        AdditiveGrid().encode(weights(), GroupParams(torch.ones(12, 1), torch.zeros(12, 1)))
    arrays = rounded(SMALL, weights()).pack()
    with pytest.raises(InputError, match="codebooks of shape"):
        SMALL.with_stored_scale(arrays | {"codebooks": arrays["codebooks"][:2]})
    with pytest.raises(InputError, match="array of codebooks of a rounded weight is missing"):
        SMALL.with_stored_scale({key: array for key, array in arrays.items() if key != "codebooks"})
    for change, reason in (
        ("weights.tune={iters: 2}", "leave tune out"),
        ("activations={grid: additive}", "not for activations"),
        ("kv_cache={grid: additive}", "integer grids only"),
        ("weights.solver={name: gptq, act_order: true}", "leave act_order out"),
    ):
        with pytest.raises(RecipeError, match=reason):
            load_recipe("aqlm", [change])
