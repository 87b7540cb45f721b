"""Tuning of rounding: a rounded matrix as a function of what is tuned, a block's loss, and whole runs."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from selection import some_pairs

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight, straight_through
from gyroquant.inspection import dry_run
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import SignRound, WeightBasis
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps import signround
from gyroquant.rounding.steps.tunable import TunableWeight
from gyroquant.testing.grids import columns_for
from gyroquant.testing.solvers import grids, problem

GRIDS = [grid for grid in grids() if grid.coded_singly]
SMALL = ["weights.group_size=16", "calibration.nsamples=16", "calibration.seqlen=32", "calibration.dtype=float32"]
TUNE = "weights.tune={iters: 20, batch_size: 4}"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestTunableWeight:
    def test_it_starts_with_what_the_solver_left(self, grid: Grid) -> None:
        weight, statistics = problem(columns=columns_for(grid))
        for solver in (RoundToNearest(), Gptq()):
            rounded = solver.solve(weight, grid.with_tensor_scale(weight), statistics)
            tunable = TunableWeight(weight, rounded)
            assert torch.allclose(tunable.matrix(), rounded.dequantize(), rtol=1e-5, atol=0)
            assert torch.equal(tunable.result().codes, rounded.codes)
            assert torch.equal(tunable.result().params.scale, rounded.params.scale)
            assert torch.equal(tunable.result().params.zero, rounded.params.zero)

    def test_what_is_trained_is_what_is_stored(self, grid: Grid) -> None:
        weight, _ = problem(columns=columns_for(grid))
        tunable = TunableWeight(weight, RoundToNearest().solve(weight, grid.with_tensor_scale(weight)))
        generator = torch.Generator().manual_seed(0)
        tunable.offset.uniform_(-0.5, 0.5, generator=generator)
        tunable.stretch.uniform_(0.8, 1.2, generator=generator)
        result = tunable.result()
        assert (result.dequantize() - tunable.matrix()).abs().max() < 1e-5 * weight.abs().max()
        codes, params = result.grid.unpack(result.pack(), (48, columns_for(grid)))
        assert torch.equal(QuantizedWeight(result.grid, codes, params).dequantize(), result.dequantize())
        assert not torch.equal(result.codes, tunable.start.codes)

    def test_gradients_point_downhill(self, grid: Grid) -> None:
        """Towards a target that can be reached: by other offsets and wider spans."""
        weight, _ = problem(columns=columns_for(grid))
        tunable = TunableWeight(weight, RoundToNearest().solve(weight, grid.with_tensor_scale(weight)))
        tunable.offset.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
        tunable.stretch.fill_(1.1)
        target = tunable.matrix()
        tunable.offset.zero_()
        tunable.stretch.fill_(1)
        losses = []
        for _ in range(30):
            difference = tunable.matrix() - target
            losses.append(float(difference.square().mean()))
            tunable.descend(difference, 0.02, 0.02)
        assert min(losses) < 0.8 * losses[0]  # steps of one length overshoot at the end


@given(st.integers(0, 10**6), st.integers(2, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_stretching_both_ends_alike_scales_the_numbers(seed: int, bits: int, symmetric: bool) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    grid = IntegerGrid(bits=bits, group_size=16, symmetric=symmetric)
    tunable = TunableWeight(weight, RoundToNearest().solve(weight, grid))
    before = tunable.result()
    tunable.stretch.fill_(1.25)
    after = tunable.result()
    assert torch.allclose(after.params.scale, 1.25 * before.params.scale, rtol=1e-3)
    assert torch.equal(after.params.zero, before.params.zero)


def test_one_end_of_an_asymmetric_span_moves_alone() -> None:
    weight = torch.linspace(-1, 2, 16)[None]
    tunable = TunableWeight(weight, RoundToNearest().solve(weight, IntegerGrid(bits=4, group_size=16, scale="minmax")))
    tunable.stretch[..., 1] = 0.5
    low, high = (end * tunable.result().params.scale for end in tunable.grid.range(tunable.result().params.zero))
    assert float(low) == pytest.approx(-1, abs=0.15)
    assert float(high) == pytest.approx(1, abs=0.15)


def test_in_a_basis_of_its_own_it_is_stored_too() -> None:
    weight, statistics = problem()
    basis = WeightBasis().fit(192, statistics.second_moments)
    rounded = RoundToNearest().solve(basis.encode(weight), IntegerGrid(bits=3, group_size=64))
    tunable = TunableWeight(weight, QuantizedWeight(rounded.grid, rounded.codes, rounded.params, basis))
    assert torch.allclose(tunable.matrix(), tunable.result().dequantize(), atol=1e-5)
    before = float(tunable.matrix().square().sum())
    for _ in range(5):
        tunable.descend(tunable.matrix(), 0.05, 0.05)
    assert float(tunable.matrix().square().sum()) < before


@given(st.integers(0, 10**6), st.integers(2, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_steps_follow_the_straight_through_gradients(seed: int, bits: int, symmetric: bool) -> None:
    """Against autograd on the formula. Offsets still move where rounding brings a weight back into the range."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 4, 32, generator=generator)
    grid = IntegerGrid(bits=bits, group_size=16, symmetric=symmetric)
    tunable = TunableWeight(weight, RoundToNearest().solve(weight, grid))
    tunable.offset.uniform_(-0.4, 0.4, generator=generator)
    tunable.stretch.uniform_(0.8, 1.2, generator=generator)
    offset, stretch = tunable.offset.clone().requires_grad_(), tunable.stretch.clone().requires_grad_()
    scale, zero = grid.rescale(tunable.start.params, stretch[..., :1], stretch[..., 1:])
    kept = grid.round_params(scale.detach(), zero.detach())
    scale, zero = straight_through(scale, kept.scale), straight_through(zero, kept.zero)
    steps = tunable.wanted / scale + offset
    by_offset = (straight_through(steps, steps.round()) + zero).clamp(0, 2**bits - 1)
    in_range = (steps + zero).clamp(0, 2**bits - 1)
    by_stretch = straight_through(in_range, in_range.round())
    slopes = []
    for codes, tensor in ((by_offset, offset), (by_stretch, stretch)):
        matrix = ((codes - zero) * scale).view(4, 32)
        assert torch.allclose(matrix, tunable.matrix(), atol=1e-5)
        slopes += torch.autograd.grad(matrix, tensor, gradient, retain_graph=True)
    moved = tunable.offset.clone(), tunable.stretch.clone()
    tunable.descend(gradient, 0.01, 0.02)
    for before, after, slope, length in zip(
        moved, (tunable.offset, tunable.stretch), slopes, (0.01, 0.02), strict=True
    ):
        sure = (slope.abs() > 1e-4) | (slope == 0)
        assert torch.allclose((after - before)[sure], -length * slope.sign()[sure], atol=1e-6)


def run(model: Path, out: Path, corpus: Path, recipe: str, *changes: str) -> dict[str, object]:
    loaded = gq.load_recipe(recipe, [*SMALL, *changes])
    return pipeline.run(prepare(model, out, loaded, corpus, tokenizer=tiny_models.tokenizer()))


@pytest.mark.parametrize(
    ("recipe", "name"),
    some_pairs(
        ["rtn", "gptq"],
        ["llama_tied", "qwen2_moe", "gpt2", "gpt_neox"],
        [("gptq", "llama_tied"), ("rtn", "qwen2_moe")],
    ),
)
def test_a_tuned_model_is_nearer_to_the_original(
    recipe: str, name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    kl = {}
    for out, tune in (("plain", ()), ("tuned", (TUNE,))):
        manifest = run(folders[name], tmp_path / out, corpus, recipe, "weights.bits=2", *tune)
        kl[out] = gq.evaluate(tmp_path / out, corpus, folders[name], window=32, tokenizer=tiny_models.tokenizer())["kl"]
        assert all(layer["weight_error"] > 0 for layer in manifest["layers"])
    assert kl["tuned"] < kl["plain"]


@pytest.mark.parametrize(
    "changes",
    [
        ["transform.R1.method=hadamard", "transform.R4.method=hadamard", "activations.bits=4", "kv_cache.bits=4"],
        pytest.param(["weights.basis={padding: pad}"], marks=pytest.mark.slow),
        pytest.param(["weights.refine={passes: 1}"], marks=pytest.mark.slow),
        ["weights.basis={padding: exact}", "weights.refine={passes: 1}", "weights.target={share: auto}"],
    ],
    ids=str,
)
def test_it_composes_and_is_repeatable(
    changes: list[str], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    for out in ("one", "two"):
        run(folders["llama_tied"], tmp_path / out, corpus, "gptq", "weights.bits=3", TUNE, *changes)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    loaded = gq.load(tmp_path / "one", dtype="float32")
    assert loaded(tiny_models.tokens(loaded)).logits.isfinite().all()


def test_interrupted_tuning_ends_with_the_same_bytes(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops in the second epoch of the second block, and continues from a state three steps earlier."""
    tune = ["weights.bits=2", "weights.tune={iters: 12, batch_size: 4}"]
    run(folders["llama_tied"], tmp_path / "whole", corpus, "rtn", *tune)
    monkeypatch.setattr(signround, "_CHECKPOINT", 5)
    plain, calls = signround.SignRoundTuner._step, iter(range(1000))

    def stopping(*args: Any) -> None:
        if next(calls) == 12 + 8:
            raise KeyboardInterrupt
        plain(*args)

    monkeypatch.setattr(signround.SignRoundTuner, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(folders["llama_tied"], tmp_path / "stopped", corpus, "rtn", *tune)
    run(folders["llama_tied"], tmp_path / "stopped", corpus, "rtn", *tune)
    assert next(calls) == 12 + 8 + 1 + 7
    whole, stopped = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "stopped"))
    assert whole == stopped


def test_the_largest_errors_can_be_left_out(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = signround.BlockTuner._error, list[tuple[float, float]]()

    def compared(self: signround.BlockTuner, sequences: list[int]) -> torch.Tensor:
        hidden, target = self.hidden[sequences], self.target[sequences]
        with torch.no_grad():
            squares = (self.block.run(self.leaves | self.rest, hidden, sequences) - target).square()
        kept = squares.flatten().sort().values[: -(squares.numel() // 100)]
        scale = (target - hidden).square().flatten(1).mean(1)
        loss = plain(self, sequences)
        if len(sequences) == 1:
            seen.append((float(loss.detach()), float(kept.sum() / squares.numel() / scale[0])))
        return loss

    monkeypatch.setattr(signround.BlockTuner, "_error", compared)
    tune = ["weights.bits=2", "weights.tune={iters: 2, batch_size: 1, outliers: 0.01}"]
    run(folders["llama_tied"], tmp_path / "out", corpus, "rtn", *tune)
    assert seen
    for loss, expected in seen:
        assert loss == pytest.approx(expected, rel=1e-4)


def test_clipping_alone_can_be_learned(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """OmniQuant's: codes follow the scales."""
    start = ["weights.bits=2", "weights.scale=minmax"]
    run(folders["llama_tied"], tmp_path / "plain", corpus, "rtn", *start)
    run(folders["llama_tied"], tmp_path / "tuned", corpus, "rtn", *start, "weights.tune={iters: 20, codes: false}")
    plain, tuned = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "tuned"))
    scales = [key for key in plain if key.endswith("_scales")]
    assert any(not torch.equal(plain[key], tuned[key]) for key in scales)


def test_tuning_that_helps_nothing_changes_nothing(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """A last state that is bad is not taken."""
    wild = "weights.tune={iters: 3, lr: 1.0, schedule: constant, best: false}"
    run(folders["llama_tied"], tmp_path / "plain", corpus, "gptq", "weights.bits=4")
    run(folders["llama_tied"], tmp_path / "tuned", corpus, "gptq", "weights.bits=4", wild)
    plain, tuned = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "tuned"))
    assert all(torch.equal(plain[key], tuned[key]) for key in plain)


def test_recipes_say_it_and_what_is_wrong_with_it() -> None:
    recipe = load_recipe("gptq", [TUNE])
    assert recipe.weights.tune == SignRound(iters=20, batch_size=4)
    assert load_recipe(recipe.to_dict()) == recipe
    assert recipe.weights.needs_original
    with pytest.raises(RecipeError, match=r"weights.tune.iters.*greater than 0"):
        load_recipe("gptq", ["weights.tune={iters: 0}"])
    with pytest.raises(RecipeError, match="leave nothing to tune"):
        load_recipe("gptq", ["weights.tune={codes: false, minmax: false}"])


def test_its_time_is_predicted(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    seconds = []
    for tune in ("null", "{iters: 400}"):
        recipe = gq.load_recipe("rtn", [*SMALL, f"weights.tune={tune}"])
        job = prepare(folders["llama_tied"], tmp_path / "out", recipe, corpus, tokenizer=tiny_models.tokenizer())
        seconds.append(dry_run.dry_run_job(job).seconds)
    assert seconds[1] > 3 * seconds[0]
