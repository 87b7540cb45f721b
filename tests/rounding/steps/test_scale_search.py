"""Scales searched before a block is tuned: each group against all candidates, and the weights that errors have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.grids import Grid, IntegerGrid
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.rounding.solvers import RoundToNearest
from gyroquant.rounding.steps import scale_search
from gyroquant.rounding.steps.base import RoundedBlock
from gyroquant.rounding.steps.scale_search import search_scales
from gyroquant.testing.grids import columns_for
from gyroquant.testing.solvers import grids, problem

SMALL = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32", "calibration.dtype=float32"]
SEARCHED = ["weights.bits=2", "weights.scale=minmax", "weights.tune={iters: 1, batch_size: 4, search_scales: true}"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_group_gets_the_best_of_the_candidates(symmetric: bool) -> None:
    weight, statistics = problem(12, 64)
    weights = statistics.second_moments.diagonal()
    grid = IntegerGrid(bits=2, group_size=16, symmetric=symmetric, scale="minmax")
    start = RoundToNearest().solve(weight, grid)
    found = search_scales(weight, start, weights[None]).dequantize()
    least = torch.full((12, 4), torch.inf)
    for factor in torch.linspace(0.4, 1.2, 41):
        params = grid.round_params(start.params.scale * factor, start.params.zero)
        numbers = grid.nearest(weight.view(12, 4, 16), params)
        least = torch.minimum(least, ((numbers - weight.view(12, 4, 16)).square() * weights.view(4, 16)).sum(-1))
    error = ((found - weight).square() * weights).view(12, 4, 16).sum(-1)
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-6)
    assert float(error.sum()) < 0.9 * float(((start.dequantize() - weight).square() * weights).sum())


@pytest.mark.parametrize("grid", [grid for grid in grids() if grid.coded_singly][::3], ids=lambda grid: grid.grid)
def test_no_stored_group_gets_worse_on_any_grid(grid: Grid) -> None:
    """And each part of the rows, such as an expert, has weights of its own."""
    weight, _ = problem(columns=columns_for(grid))
    weights = torch.rand(2, weight.shape[1], generator=torch.Generator().manual_seed(0)) ** 4
    start = RoundToNearest().solve(weight, grid.with_tensor_scale(weight))
    found = search_scales(weight, start, weights)
    size = grid.group_of(weight.shape[1]) * grid.super_block
    errors = [
        ((q.dequantize() - weight).square() * weights.repeat_interleave(24, 0)).unflatten(1, (-1, size)).sum(-1)
        for q in (start, found)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < float(errors[0].sum())
    codes, params = found.grid.unpack(found.pack(), (48, weight.shape[1]))
    assert torch.equal(replace(found, codes=codes, params=params).dequantize(), found.dequantize())


def run(folder: Path, out: Path, corpus: Path, *changes: str) -> dict[str, Any]:
    recipe = gq.load_recipe("rtn", [*SMALL, *changes])
    return pipeline.run(prepare(folder, out, recipe, corpus, tokenizer=tiny_models.tokenizer()))


def test_errors_count_by_the_mean_squares_of_inputs(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first block are the ones that the unrounded model has there."""
    plain, seen = scale_search._input_squares, list[dict[str, Tensor]]()

    def noted(block: RoundedBlock, names: Any) -> dict[str, Tensor]:
        seen.append(plain(block, names))
        return seen[-1]

    monkeypatch.setattr(scale_search, "_input_squares", noted)
    recipe = gq.load_recipe("rtn", [*SMALL, *SEARCHED])
    job = prepare(folders["llama_tied"], tmp_path / "out", recipe, corpus, tokenizer=tiny_models.tokenizer())
    pipeline.run(job)
    model, expected = AutoModelForCausalLM.from_pretrained(folders["llama_tied"], dtype=torch.float32), {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module: Any, inputs: Any, name: str = name) -> None:
                expected[f"model.layers.0.{name}.weight"] = inputs[0].flatten(0, 1).square().mean(0)

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(job.tokens)
    assert seen[0].keys() == expected.keys()
    for name, squares in expected.items():
        torch.testing.assert_close(seen[0][name][0], squares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "changes"),
    [("llama_tied", []), ("mixtral", ["weights.basis={}"]), ("llama_tied", ["weights.low_rank={rank: 2}"])],
)
def test_it_runs_with_experts_a_basis_and_branches(
    model: str, changes: list[str], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    manifest = run(folders[model], tmp_path / "out", corpus, *SEARCHED, *changes)
    assert manifest["recipe"]["weights"]["tune"]["search_scales"] is True


def test_what_it_would_undo_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"undoes what the solver gptq has compensated: take the solver rtn"):
        gq.load_recipe("gptq", ["weights.tune={search_scales: true}"])
    with pytest.raises(RecipeError, match="undoes refine: leave one of them out"):
        gq.load_recipe("rtn", ["weights.tune={search_scales: true}", "weights.refine={}"])
    with pytest.raises(RecipeError, match=r"weights\.tune\.search_scales"):
        gq.load_recipe("rtn", ["weights.tune={search_scales: often}"])
    plain = gq.load_recipe("rtn", ["weights.tune={}"])
    assert "search_scales" not in plain.to_dict()["weights"]["tune"]
    assert gq.load_recipe(gq.load_recipe("rtn", SEARCHED).to_dict()) == gq.load_recipe("rtn", SEARCHED)
