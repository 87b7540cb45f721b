"""Codes that are learned with Gumbel noise: gradients against autograd, known answers, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_runs import run

from gyroquant.errors import RecipeError
from gyroquant.grids import FloatZeroGrid, Grid, IntegerGrid, QuantizedWeight
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages.quantize import Quantize
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import GumbelSoftmax, WeightBasis
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps import gumbel, signround
from gyroquant.rounding.steps.gumbel import GumbelWeight, move
from gyroquant.testing.solvers import problem

GRIDS = [
    IntegerGrid(bits=2, group_size=16),
    IntegerGrid(bits=2, group_size=16, symmetric=True, midrise=True),
    IntegerGrid(bits=1, group_size=16, symmetric=True),
    IntegerGrid(bits=3, group_size=32, symmetric=True),
    IntegerGrid(bits=4, group_size=-1),
    FloatZeroGrid(bits=3, group_size=16),
]
TUNE = "weights.gumbel={iters: 40, batch_size: 4, lr: 0.002, scale_lr: 0.001}"


def rounded(grid: Grid, rows: int = 8, columns: int = 64) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return RoundToNearest().solve(weight, grid.with_tensor_scale(weight))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_begins_near_the_codes_of_the_solver(grid: Grid) -> None:
    start = rounded(grid)
    weight = GumbelWeight(start, 0)
    top = 2**grid.bits - 1
    assert weight.logits.shape[-1] == min(5, top + 1)
    result = weight.result()
    assert float((result.codes == start.codes).float().mean()) > 0.9
    assert torch.allclose(weight.matrix(), result.dequantize(), atol=1e-5)
    assert int(result.codes.max()) <= top
    # the initial logits: 0.01 (noise - 3 d^2, centred); codes beyond the grid are not candidates
    finite = weight.logits.isfinite()
    assert bool(((weight.logits - weight.logits.masked_fill(~finite, -9).amax(-1, keepdim=True))[finite] <= 0).all())
    if grid.bits > 2:
        shifts = torch.arange(-2, 3)
        assert torch.equal(
            finite,
            (start.codes.view(*weight.logits.shape[:3], 1) + shifts).clamp(0, top) - shifts
            == start.codes.view(*weight.logits.shape[:3], 1),
        )
        inside = finite.all(-1)
        means = weight.logits[inside].mean(0) / 0.01
        assert torch.allclose(means, -3.0 * (shifts.float().square() - 2), atol=0.5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_step_goes_against_the_gradient(grid: Grid) -> None:
    """Against autograd on the formula, with the noise of the step."""
    start = rounded(grid)
    weight = GumbelWeight(start, 3)
    weight.draw(5, 0.7, 150.0)
    assert torch.equal(weight.matrix(), weight.matrix())  # the same noise
    pull = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    logits, stretch = weight.logits.clone().requires_grad_(), weight.stretch.clone().requires_grad_()
    (piece, codes) = next(weight._pieces())
    assert piece.stop >= 8
    noise = torch.rand(logits.shape, generator=gumbel.seeded(3, 5, 0)).clamp_min(1e-30).log().neg().clamp_min(1e-30)
    shares = ((150.0 * logits - noise.log()) / 0.7).softmax(-1)
    params, _ = weight._params(stretch)
    matrix = (((shares * codes).sum(-1) - params.zero) * params.scale).view(8, 64)
    assert torch.allclose(matrix, weight.matrix(), atol=1e-5)
    of_logits, of_stretch = torch.autograd.grad(matrix, (logits, stretch), pull)
    before = weight.logits.clone(), weight.stretch.clone()
    weight.descend(pull, 1e-3, 1e-4, 0.5)
    finite = before[0].isfinite()
    sure = finite & (of_logits.abs() > 1e-4)
    expected = before[0] * (1 - 1e-3 * 0.5) - 1e-3 * of_logits.sign()
    assert torch.allclose(weight.logits[sure], expected[sure], atol=1e-6)
    assert not weight.logits[~finite].isfinite().any()
    assert not weight.logits.isnan().any()
    sure = of_stretch.abs() > 1e-4
    assert torch.allclose((weight.stretch - before[1])[sure], -1e-4 * of_stretch.sign()[sure], atol=1e-6)


def test_lion() -> None:
    """Two steps by hand: the sign of 0.9 m + 0.1 g, then m = 0.99 m + 0.01 g."""
    tensor, momentum = torch.tensor([1.0]), torch.tensor([0.0])
    move(tensor, momentum, torch.tensor([2.0]), 0.1, 0.0)
    assert float(tensor) == pytest.approx(0.9)
    assert float(momentum) == pytest.approx(0.02)
    move(tensor, momentum, torch.tensor([-0.1]), 0.1, 1.0)  # 0.9 * 0.02 - 0.1 * 0.1 > 0: the momentum wins
    assert float(tensor) == pytest.approx(0.9 * 0.9 - 0.1)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_finds_neighbouring_codes(bits: int) -> None:
    """The target is a matrix of other codes of the same grid: the loss is 0 there alone."""
    start = rounded(IntegerGrid(bits=bits, group_size=16))
    shift = torch.randint(-1, 2, start.codes.shape, generator=torch.Generator().manual_seed(2))
    codes = (start.codes.int() + shift).clamp(0, 2**bits - 1).to(torch.uint8)
    target = QuantizedWeight(start.grid, codes, start.params).dequantize()
    weight, settings = GumbelWeight(start, 0), GumbelSoftmax(iters=150, lr=2e-3)
    for step in range(settings.iters):
        weight.draw(step, *settings.anneal(step))
        weight.descend(weight.matrix() - target, settings.lr * settings.fall(step), 0.0, 1.0)
    assert float((weight.result().codes == codes).float().mean()) > 0.99
    assert torch.equal(weight.result().params.scale, start.params.scale)


def test_in_a_basis_it_is_stored_too() -> None:
    matrix, statistics = problem()
    basis = WeightBasis().fit(192, statistics.second_moments)
    start = RoundToNearest().solve(basis.encode(matrix), IntegerGrid(bits=3, group_size=64))
    weight = GumbelWeight(QuantizedWeight(start.grid, start.codes, start.params, basis), 0)
    losses = []
    for step in range(60):
        weight.draw(step, 0.2, 200.0)
        losses.append(float((weight.matrix() - matrix).square().sum()))
        weight.descend(weight.matrix() - matrix, 1e-3, 1e-3, 0.0)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert torch.allclose(weight.result().dequantize(), weight.matrix(), atol=1e-5)


def test_rates_fall() -> None:
    settings = GumbelSoftmax(iters=11)
    assert settings.anneal(0) == (2.0, 100.0)
    assert settings.anneal(10) == pytest.approx((0.05, 500.0))
    assert settings.anneal(5) == pytest.approx((0.1**0.5, 50000**0.5))
    assert (settings.fall(0), settings.with_iterations(2).fall(1)) == pytest.approx((1.0, 0.5))
    assert GumbelSoftmax(iters=1).anneal(0) == (2.0, 100.0)


def test_the_error_of_every_block_falls(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the codes that are stored, on all sequences."""
    better, errors = gumbel.GumbelTuner._better_layers, list[tuple[float, float]]()

    def measured(self: gumbel.GumbelTuner, *args: Any) -> Any:
        layers, every = better(self, *args), list(range(len(self.hidden)))
        pair = []
        for known in (self.block.layers, layers):
            for name, leaf in self.leaves.items():
                leaf.detach().copy_(known[name].param)
            pair.append(self.loss(every, backward=False))
        errors.append((pair[0], pair[1]))
        return layers

    monkeypatch.setattr(gumbel.GumbelTuner, "_better_layers", measured)
    run(folders["llama_tied"], tmp_path / "out", "gptq", corpus, "weights.bits=2", TUNE)
    assert len(errors) == 2
    assert all(after < 0.8 * before for before, after in errors)


def test_interrupted_learning_ends_with_the_same_bytes_and_tune_may_follow(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops in the second block, and continues from a state some steps earlier."""
    tune = ["weights.bits=2", "weights.gumbel={iters: 12, batch_size: 4}", "weights.tune={iters: 6, batch_size: 4}"]
    run(folders["llama_tied"], tmp_path / "whole", "rtn", corpus, *tune)
    monkeypatch.setattr(signround, "_CHECKPOINT", 5)
    plain, calls = gumbel.GumbelTuner._step, iter(range(1000))

    def stopping(*args: Any) -> None:
        if next(calls) == 12 + 8:
            raise KeyboardInterrupt
        plain(*args)

    monkeypatch.setattr(gumbel.GumbelTuner, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(folders["llama_tied"], tmp_path / "stopped", "rtn", corpus, *tune)
    run(folders["llama_tied"], tmp_path / "stopped", "rtn", corpus, *tune)
    assert next(calls) == 12 + 8 + 1 + 7
    whole, stopped = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "stopped"))
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())


def test_recipes_say_it_and_what_is_wrong_with_it() -> None:
    recipe = load_recipe("gptq", [TUNE])
    assert recipe.weights.gumbel == GumbelSoftmax(iters=40, batch_size=4, lr=0.002, scale_lr=0.001)
    assert load_recipe(recipe.to_dict()) == recipe
    assert [step.key for step in load_recipe("gptq", [TUNE, "weights.tune={}"]).weights.block_steps] == [
        "gumbel",
        "tune",
    ]
    assert "gumbel" not in load_recipe("gptq").to_dict()["weights"]
    assert recipe.weights.needs_original
    with pytest.raises(RecipeError, match="the grid fp4 has none: use tune"):
        load_recipe("gptq", [TUNE, "weights.grid=fp4"])
    with pytest.raises(RecipeError, match="granularity: rows cannot be combined with gumbel: leave gumbel out"):
        load_recipe(
            "gptq",
            [TUNE, "weights.allocate={budget: 3, bits: [2, 3, 4], costs: gradient, granularity: rows}"],
        )
    with pytest.raises(RecipeError, match=r"weights\.gumbel\.lr.*greater than 0"):
        load_recipe("gptq", ["weights.gumbel={lr: 0}"])


def test_its_memory_is_counted(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    needed = {}
    for changes in ((), (TUNE,)):
        recipe = load_recipe("signround", ["weights.group_size=16", "calibration.seqlen=32", *changes])
        job = prepare(folders["llama_tied"], tmp_path / "out", recipe, corpus, tokenizer=tiny_models.tokenizer())
        needed[len(changes)] = Quantize().memory(MemoryModel(job))
    assert needed[1] > needed[0]
