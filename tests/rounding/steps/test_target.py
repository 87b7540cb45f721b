"""The shifted target: the least-squares identity that it rests on, its share, and whole runs with it."""

from pathlib import Path

import pytest
import tiny_models
import torch
from paired_problem import Problem

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.grids import IntegerGrid
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.rounding import InputStatistics, Target
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.steps.target import determination


def silent(text: str) -> None:
    raise AssertionError(text)


def statistics(made: Problem) -> InputStatistics:
    away = made.x - made.y
    seen = made.statistics
    return InputStatistics(seen.second_moments, seen.count, seen.input_error_cross, (away.T @ away).float())


def test_the_two_objectives_differ_by_a_constant() -> None:
    made = Problem(tokens=300)
    wanted, plain = Target(share=1, damp_percent=0).shifted(made.weight, statistics(made), silent)
    assert plain.input_error_cross is None
    gaps = []
    for seed in range(4):
        q = made.weight + torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(seed))
        ours = float((made.y @ (wanted - q).double().T).square().sum())
        gaps.append(made.error(q) - ours)
    assert gaps == pytest.approx([gaps[0]] * 4, rel=1e-3)


def test_the_share_is_the_coefficient_of_determination() -> None:
    """Of a least-squares fit of the drifted output by the input that the layer has."""
    made = Problem(rows=6, columns=24, tokens=400, noise=0.5)
    missing = (made.x - made.y) @ made.weight.double().T
    fit = made.y @ torch.linalg.lstsq(made.y, missing).solution
    wanted = float(fit.square().sum() / missing.square().sum())
    assert 0.1 < wanted < 0.99
    full, _ = Target(share=1, damp_percent=0).shifted(made.weight, statistics(made), silent)
    auto, _ = Target(damp_percent=0).shifted(made.weight, statistics(made), silent)
    assert torch.allclose(auto - made.weight, wanted * (full - made.weight), atol=1e-4)


def test_shares_are_shares() -> None:
    assert determination(0.0, 0.0) == 0.0
    assert determination(2.0, 1.0) == 1.0
    assert determination(-1e-9, 1.0) == 0.0


def test_without_a_drift_nothing_moves() -> None:
    made = Problem()
    plain = InputStatistics(made.statistics.second_moments, made.statistics.count)
    assert torch.equal(Target().shifted(made.weight, plain, silent)[0], made.weight)
    still = InputStatistics(
        plain.second_moments,
        plain.count,
        torch.zeros_like(plain.second_moments),
        torch.zeros_like(plain.second_moments),
    )
    assert torch.equal(Target().shifted(made.weight, still, silent)[0], made.weight)


def test_gptq_towards_it_comes_nearer_to_what_the_unrounded_model_gave() -> None:
    made, grid = Problem(rows=32, columns=64, tokens=1000, noise=0.6), IntegerGrid(bits=4, group_size=32)
    wanted, plain = Target().shifted(made.weight, statistics(made), silent)
    towards = Gptq().solve(wanted, grid, plain).dequantize()
    gptq = Gptq().solve(made.weight, grid, plain).dequantize()
    assert made.error(towards) < 0.7 * made.error(gptq)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_moe"])
def test_a_run_towards_it_is_nearer_to_the_original(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    small = ["weights.group_size=16", "calibration.nsamples=64", "calibration.seqlen=32", "calibration.dtype=float32"]
    kl = {}
    for out, changes in (("plain", []), ("towards", ["weights.target={share: auto}"])):
        recipe = gq.load_recipe("gptq", [*small, *changes, "weights.bits=2"])
        pipeline.run(prepare(folders[name], tmp_path / out, recipe, corpus, tokenizer=tiny_models.tokenizer()))
        kl[out] = gq.evaluate(tmp_path / out, corpus, folders[name], window=32, tokenizer=tiny_models.tokenizer())["kl"]
    assert kl["towards"] < kl["plain"]


def test_solvers_that_correct_drift_take_no_target() -> None:
    with pytest.raises(RecipeError, match=r"qronos corrects the input error by itself.*take gptq"):
        gq.load_recipe("qronos", ["weights.target={share: auto}"])
    recipe = gq.load_recipe("gptq", ["weights.target={share: 0.5}"])
    assert gq.load_recipe(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match=r"weights.target"):
        gq.load_recipe("gptq", ["weights.target={share: 1.5}"])
