"""Zero points that are any number: the exact search, the gain over codes, offsets far from zero, and what is stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.formats.base import Layer, ModelRequirements, format_named
from gyroquant.grids import FloatZeroGrid, IntegerGrid, stored_bits
from gyroquant.grids.error import weight_error
from gyroquant.grids.zero_search import best_zero
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import Refine, output_error
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.testing.grids import rounded, weights
from gyroquant.testing.solvers import problem

# Squared error over squared weights, by bits and group size: least squares over the codes from 64 scales, 6 rounds.
NORMAL = {(2, 64): 0.1032, (2, 128): 0.1117, (3, 64): 0.0274, (4, 128): 0.0084}
HEAVY = {(2, 64): 0.148}


def error_at(groups: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The squared error in squared steps, shape (groups, zeros), at zero points of shape (groups, zeros)."""
    steps = groups[:, None] / scale[..., None] + zero[..., None]
    return (steps - steps.round().clamp(0, levels)).square().sum(-1)


@given(st.integers(1, 5), st.integers(2, 40), st.floats(0.1, 3), st.floats(-4, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_search_for_a_zero_point_is_exact(bits: int, n: int, width: float, shift: float, seed: int) -> None:
    """No zero point of a fine net is better, whether the codes are narrower than the group or wider."""
    groups = torch.randn(4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    levels = 2**bits - 1
    scale = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / levels * width
    zero, error = best_zero(groups, scale, levels)
    assert torch.allclose(error_at(groups, scale, zero, levels), error, atol=1e-6)
    reach = groups.abs().amax(1, keepdim=True) / scale + levels + 1
    net = torch.linspace(-1, 1, 4001, dtype=torch.float64) * reach
    assert (error <= error_at(groups, scale, net, levels).amin(1, keepdim=True) + 1e-6).all()


def test_the_search_sees_a_best_zero_point_between_two_local_ones() -> None:
    """Two clusters, at 0 and at 2.5 steps: rounding to codes is off by half a step for one of them or a quarter for
    both, and the second is better.
    """
    groups = torch.tensor([[0.0] * 8 + [2.5] * 8])
    zero, error = best_zero(groups, torch.ones(1, 1), 3)
    assert float(error) == pytest.approx(16 / 16)
    assert float(zero) % 1 in (pytest.approx(0.25), pytest.approx(0.75))


def heavy(rows: int, columns: int) -> Tensor:
    """Random numbers of Student's distribution with 5 degrees of freedom."""
    generator = torch.Generator().manual_seed(1)
    squares = torch.randn(rows, columns, 5, generator=generator).square().sum(-1)
    return torch.randn(rows, columns, generator=generator) / (squares / 5).sqrt()


@pytest.mark.parametrize(("bits", "size"), NORMAL)
def test_normal_weights_have_the_known_errors(bits: int, size: int) -> None:
    """Those of the search are 1 to 3 percent lower, and far below those of zero points that are codes."""
    weight = torch.randn(96, 2048, generator=torch.Generator().manual_seed(0))
    error = weight_error(weight, rounded(FloatZeroGrid(bits=bits, group_size=size), weight).dequantize())
    assert 0.96 * NORMAL[bits, size] < error < NORMAL[bits, size]
    codes = weight_error(weight, rounded(IntegerGrid(bits=bits, group_size=size), weight).dequantize())
    assert error < (0.83, 0.88, 0.92)[bits - 2] * codes


def test_heavy_tails_have_the_known_error() -> None:
    weight = heavy(96, 2048)
    errors = {
        grid.grid: weight_error(weight, rounded(grid, weight).dequantize())
        for grid in (FloatZeroGrid(bits=2, group_size=64), IntegerGrid(bits=2, group_size=64))
    }
    assert errors["float_zero"] == pytest.approx(HEAVY[2, 64], rel=0.04)
    assert errors["float_zero"] < 0.9 * errors["integer"]


def test_a_group_needs_32_bits() -> None:
    weight = rounded(FloatZeroGrid(bits=2, group_size=64), weights(64))
    assert stored_bits(weight.pack()) / weight.codes.numel() == 2.5
    assert weight.pack()["zeros"].dtype == torch.float16


@pytest.mark.parametrize("offset", [0.0, 0.3, 5.0, -200.0])
@pytest.mark.parametrize("scale", ["minmax", "mse"])
def test_an_offset_costs_no_more_than_fp16_rounds(offset: float, scale: str) -> None:
    """An integer zero point would have to reach 0."""
    grid, weight = FloatZeroGrid(bits=4, group_size=64, scale=scale), weights(16)
    plain = (rounded(grid, weight).dequantize() - weight).abs().max()
    moved = (rounded(grid, weight + offset).dequantize() - weight - offset).abs().max()
    assert moved <= 1.05 * plain + 2.0**-10 * abs(offset)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.1, 1e-6, -60000.0])
def test_equal_weights_come_back(value: float) -> None:
    for grid in (FloatZeroGrid(bits=2, group_size=64), FloatZeroGrid(bits=8, group_size=64, scale="minmax")):
        result = rounded(grid, torch.full((2, 192), value)).dequantize()
        assert (result - value).abs().max() <= 2.0**-10 * abs(value) + 2.0**-24


def test_rounded_weights_come_back() -> None:
    """Also those whose largest code is not used, and those far from 0."""
    generator = torch.Generator().manual_seed(0)
    for bits, largest, zero in ((2, 3, 1.37), (2, 2, 0.5), (3, 5, -8.25), (4, 15, 7.75)):
        codes = torch.randint(largest + 1, (6, 192), generator=generator)
        weight = (codes - zero) * torch.tensor([0.25, 0.01, 3.0]).half().float().repeat(2)[:, None]
        back = rounded(FloatZeroGrid(bits=bits, group_size=64), weight).dequantize()
        assert torch.allclose(back, weight, rtol=2.0**-9, atol=0.002 * float(weight.abs().max()))


def test_the_quick_search_has_nearly_the_same_error() -> None:
    grid = FloatZeroGrid(bits=2, group_size=64)
    assert grid.quick.quick == grid.quick
    assert grid.quick.model_dump() == grid.model_dump()
    weight = weights(64)
    exact, quick = (weight_error(weight, rounded(g, weight).dequantize()) for g in (grid, grid.quick))
    assert exact < quick < 1.08 * exact


def test_tuned_ends_of_a_range_without_zero_keep_their_order() -> None:
    """The low end may move towards zero by half of the range and the high end as well."""
    grid = FloatZeroGrid(bits=2, group_size=64, scale="minmax")
    weight = weights(4) * 0.1 + 1.0
    params = rounded(grid, weight).params
    for low, high in ((1.5, 0.5), (0.5, 1.5), (1.0, 1.0)):
        factors = (torch.full_like(params.scale, factor) for factor in (low, high))
        scale, zero = grid.rescale(params, *factors)
        ends = [(end - zero) * scale for end in (0, 3)]
        middle = (1.5 - params.zero) * params.scale
        assert torch.allclose(middle - ends[0], low * 1.5 * params.scale, atol=1e-5)
        assert torch.allclose(ends[1] - middle, high * 1.5 * params.scale, atol=1e-5)


def test_refinement_finds_the_best_scale_and_zero_point_of_fixed_codes() -> None:
    """With one group a row and codes that stay, one call reaches the least squares solution up to fp16."""
    weight, statistics = problem()
    start = RoundToNearest().solve(weight + 0.4, FloatZeroGrid(bits=3, group_size=-1, scale="minmax"))
    from gyroquant.rounding.base import PreparedWeight
    from gyroquant.rounding.steps.refine import _Descent

    descent = _Descent(PreparedWeight("w", weight, statistics, None, start.grid, start), 0.0)
    descent.scales()
    h = (statistics.second_moments / max(statistics.count, 1)).double()
    for row in range(0, len(weight), 7):
        basis = torch.stack([start.codes[row].double(), torch.ones(weight.shape[1], dtype=torch.float64)])
        best = torch.linalg.solve(basis @ h @ basis.T, basis @ h @ weight[row].double()) @ basis
        error, least = ((q - weight[row]) @ h @ (q - weight[row]) for q in (descent.number[row].double(), best))
        assert float(error) <= float(least) * 1.002


def test_refinement_gains_more_than_on_whole_zero_points() -> None:
    weight, statistics = problem()
    shares = []
    for grid in (FloatZeroGrid(bits=2, group_size=64), IntegerGrid(bits=2, group_size=64)):
        before = RoundToNearest().solve(weight, grid)
        after = Refine().run(weight, before, statistics)
        shares.append(output_error(weight, after.dequantize(), statistics))
    assert shares[0] < 0.95 * shares[1]


def test_a_recipe_asks_for_it() -> None:
    recipe = load_recipe("gptq-w2g64", ["weights.grid=float_zero"])
    assert recipe.weights.grid == FloatZeroGrid(bits=2, group_size=64)
    assert load_recipe(recipe.to_dict()) == recipe
    assert gq.FloatZeroGrid is FloatZeroGrid
    with pytest.raises(RecipeError, match="symmetric"):
        load_recipe("rtn", ["weights.grid=float_zero", "weights.symmetric=true"])


def test_every_step_takes_it_and_the_folder_verifies(tmp_path: Path) -> None:
    """GPTQ, refinement, SignRound, bit allocation, a rounded table and finetuning."""
    chosen = {"grid": "float_zero", "bits": 2, "group_size": 32}
    recipe: dict[str, Any] = {
        "weights": chosen | {"solver": "gptq", "refine": {}, "tune": {"iters": 4, "batch_size": 2}},
        "embeddings": chosen | {"bits": 4},
        "finetune": {"steps": 2, "batch_size": 1, "held_out": 1},
        "calibration": {"nsamples": 4, "seqlen": 32},
        "proof": {"seqlen": 32},
    }
    recipe["weights"]["allocate"] = {"budget": 3.9}
    text, out = [tiny_models.prose(6000)], tmp_path / "out"
    gq.quantize(tiny_models.build("llama"), recipe, text, out=out, tokenizer=tiny_models.tokenizer())
    stored = json.loads((out / "gyroquant.json").read_text())["bits"]
    assert stored["per_weight"] <= 3.9
    assert stored["stored_bits"]["zeros"] == stored["stored_bits"]["scales"] == stored["rounded_weights"] // 32 * 16
    assert gq.verify(out)
    assert gq.load(out, dtype="float32")(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gguf", "gptq", "compressed-tensors", "executorch"])
def test_formats_without_offsets_refuse_it_by_name(name: str) -> None:
    layer = Layer("model.layers.0.mlp.up_proj.weight", FloatZeroGrid(bits=2, group_size=64), 128)
    reasons = format_named(name).incompatibilities(ModelRequirements("llama", (layer,)))
    assert any("no type for 2-bit float_zero weights in groups of 64 (model.layers.0.mlp" in text for text in reasons)


def test_parts_that_need_codes_as_zero_points_refuse_it_by_name() -> None:
    with pytest.raises(RecipeError, match="KV cache takes integer grids only, not float_zero"):
        load_recipe("rtn", ["kv_cache={grid: float_zero, bits: 4, group_size: 16}"])
    with pytest.raises(RecipeError, match="rounds to integer grids only"):
        load_recipe({"weights": {"grid": "float_zero", "solver": "auto_round"}})
