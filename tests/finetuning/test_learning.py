"""Learned rotations: they stay rotations, every objective falls, a stopped run goes on to the same end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_runs import run

import gyroquant as gq
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.finetuning.differentiable_fold import DifferentiableFold, learnable, with_values
from gyroquant.finetuning.objectives import Loss, Sample, kurtosis
from gyroquant.finetuning.parameters import Place
from gyroquant.finetuning.rotations import Setting, learn
from gyroquant.finetuning.rotations_file import load_rotations
from gyroquant.finetuning.stiefel import CayleySGD, drift, orthogonalized, scheduled
from gyroquant.grids import IntegerGrid
from gyroquant.inspection.model import inspect_model
from gyroquant.maps import BlockDiagonal, Butterfly, Dense, Diagonal
from gyroquant.models.execution.online import fake
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.execution.switches import scaled_ste
from gyroquant.models.folding.fold import FoldPlan, fold
from gyroquant.models.folding.prove import prove
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.folds import plan_folds
from gyroquant.pipeline.planning import plan_quantizers
from gyroquant.rounding.layers import find_targets
from gyroquant.system.progress import Progress

OBJECTIVES = ("cross_entropy", "kl", "kurtosis", "weights")
BASE = ["weights.group_size=16", "transform.R1={method: hadamard, random_signs: true}", "transform.R2=hadamard"]


def setting(model: Any, recipe: gq.Recipe, rounded: bool) -> Setting:
    graph = open_model(model).graph
    targets = find_targets(graph, recipe.weights.grid_of, recipe.weights.ignore)
    quantizers = plan_quantizers(graph, recipe)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 96, (6, 24), generator=generator)
    return Setting(
        tokens, targets, dict.fromkeys(targets, recipe.weights.grid) if rounded else {}, quantizers, torch.float32, 0
    )


def learned(
    name: str,
    objective: str,
    *changes: str,
    rounded: bool = False,
    checkpoint: Path | None = None,
    outliers: float = 1.0,
) -> Any:
    model = tiny_models.build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :3] *= outliers
        for parameter, value in model.named_parameters():
            if parameter.endswith("layernorm.weight"):
                value[:3] /= outliers  # what is large in the stream is no more than the rest to the layers
    recipe = gq.load_recipe(
        "rtn", [*BASE, f"learn.objective={objective}", "learn.steps=6", "learn.batch_size=2", *changes]
    )
    store = open_model(model)
    plan = plan_folds(store.graph, recipe)
    result = learn(store, plan, recipe.learn, setting(model, recipe, rounded), Progress(), checkpoint)
    return model, store, plan, result


def test_steps_stay_on_the_manifold_and_go_down() -> None:
    generator = torch.Generator().manual_seed(0)
    goal = orthogonalized(torch.linalg.qr(torch.randn(3, 16, 16, generator=generator, dtype=torch.float64))[0])
    r = orthogonalized(
        torch.linalg.qr(goal + 0.1 * torch.randn(3, 16, 16, generator=generator, dtype=torch.float64))[0]
    )
    signs = torch.sign((r * goal).sum((1,), keepdim=True))
    r = orthogonalized(r * signs)
    optimizer = CayleySGD(momentum=0.5)
    distances = [float((r - goal).norm())]
    for _ in range(60):
        r = optimizer.step("r", r, r - goal, 0.3)
        distances.append(float((r - goal).norm()))
        assert drift(r) < 1e-12
    assert distances[-1] < 1e-2 * distances[0]


def test_schedules_begin_at_lr_and_end_near_nothing() -> None:
    assert scheduled(1.5, 0, 100, "cosine") == 1.5
    assert scheduled(1.5, 50, 100, "cosine") == pytest.approx(0.75)
    assert scheduled(1.5, 99, 100, "linear") == pytest.approx(0.015)
    assert scheduled(1.5, 99, 100, "constant") == 1.5


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_falls_and_the_model_stays_the_same_function(name: str, objective: str) -> None:
    changes = ["learn.steps=12", "learn.lr=0.3", "activations.bits=3", "learn.batch_size=6"]
    model, store, plan, result = learned(name, objective, *changes)
    assert min(result.losses[-3:]) < result.losses[0]
    assert result.drift < 1e-12
    proof = prove(store, result.plan, BlockRunner(model, store.graph), tiny_models.tokens(model), 5e-6)
    assert proof.worst_block_error < 5e-6
    first = next(m for site, m, _ in plan.folded if site.name == "R1")
    last = next(m for site, m, _ in result.plan.folded if site.name == "R1")
    assert float((first.dense() - last.dense()).norm()) > 1e-3


def started(plan: FoldPlan, places: dict[str, Place]) -> dict[str, torch.Tensor]:
    return {label: place.parameter.start(plan.folded[place.index][1]) for label, place in places.items()}


SCALED = [f"transform.{site}=unit_scale" for site in ("attn_in", "mlp_in", "R4")]
SCALES = [*SCALED, "learn.sites=[R1, R2, attn_in, mlp_in, R4]", "learn.adam_lr=0.05"]


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "phi3"])
@pytest.mark.parametrize("objective", ["kl", "weights"])
def test_scales_are_learned_beside_rotations(name: str, objective: str) -> None:
    changes = [
        *SCALES,
        "learn.steps=12",
        "learn.lr=0.1",
        "learn.adam_lr=0.02",
        "activations.bits=3",
        "learn.batch_size=6",
    ]
    if objective == "kl":  # straight through the rounding to 3 bits, steps of scales are mostly noise
        changes.append("learn.gradient=scaled_ste")
    model, store, _, result = learned(name, objective, *changes, rounded=True)
    assert sum(result.losses[-3:]) / 3 < result.losses[0]
    proof = prove(store, result.plan, BlockRunner(model, store.graph), tiny_models.tokens(model), 5e-6)
    assert proof.worst_block_error < 5e-6
    for site in ("attn_in", "mlp_in", "R4"):
        last = next(m for there, m, _ in result.plan.folded if there.name == site)
        assert isinstance(last, Diagonal)
        assert float((last.values - 1).abs().max()) > 0.02


@pytest.mark.parametrize("name", ["llama_tied", "phi3"])
def test_outputs_of_blocks_get_better_where_there_are_outliers(name: str) -> None:
    """From no rotation at all. It takes a gradient that knows what outliers do: straight through it gets worse."""
    losses = {}
    for gradient in ("straight", "scaled_ste"):
        changes = ["transform.R1=identity", "transform.R2=null", "learn.sites=[R1]", f"learn.gradient={gradient}"]
        changes += ["learn.steps=25", "learn.lr=1.0", "activations.bits=4", "learn.batch_size=6"]
        model, store, _, result = learned(name, "blocks", *changes, outliers=40.0)
        losses[gradient] = result.losses
        prove(store, result.plan, BlockRunner(model, store.graph), tiny_models.tokens(model), 5e-6)
    assert losses["scaled_ste"][-1] < 0.6 * losses["scaled_ste"][0]
    assert losses["scaled_ste"][-1] < 0.6 * losses["straight"][-1]


def test_the_two_gradients_differ() -> None:
    losses = [learned("llama", "kl", f"learn.gradient={g}", rounded=True)[3].losses for g in ("straight", "scaled_ste")]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]


def test_a_start_from_the_identity_is_folded_as_what_it_becomes() -> None:
    """The gains are absorbed, and a tied head untied, before the first step as after it."""
    changes = ["transform.R1=identity", "transform.attn_in=unit_scale", "learn.steps=3", "learn.lr=0.3"]
    model, store, plan, result = learned("llama_tied", "kl", *changes, rounded=True)
    proof = prove(store, result.plan, BlockRunner(model, store.graph), tiny_models.tokens(model), 5e-6)
    places = learnable(plan, ("R1", "R2"))
    begun = with_values(plan, places, started(plan, places))
    outer = store.read(store.graph.outer_params())
    assert begun.unties(outer) == result.plan.unties(outer) == ("lm_head.weight",)
    tensors = store.read(store.graph.block_params(0))
    live = DifferentiableFold(begun, places, tensors, tensors)(result.plan)
    for name, value in fold(result.plan, tensors).items():
        assert torch.allclose(live[name], value, atol=1e-5)
    assert proof.relative_logit_error < 5e-6


def test_scales_are_no_rotations(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = [*BASE, "transform.R2=unit_scale", "learn.steps=2", "learn.objective=weights"]
    run(folders["llama"], tmp_path / "out", "rtn", corpus, *changes)
    assert set(load_rotations(tmp_path / "out")) == {"R1"}
    scores = gq.evaluate(tmp_path / "out", corpus, window=32, windows=2, tokenizer=tiny_models.tokenizer())
    assert scores["perplexity"] > 1  # the rotations beside the weights are not taken for weights


def test_butterflies_stay_butterflies() -> None:
    changes = ["transform.R1={method: butterfly, block: 16}", "learn.adam_lr=0.05", "learn.steps=12"]
    model, store, _, result = learned("llama", "weights", *changes)
    assert min(result.losses[-3:]) < result.losses[0]
    m = next(m for site, m, _ in result.plan.folded if site.name == "R1")
    assert isinstance(m, BlockDiagonal)
    assert all(isinstance(part, Butterfly) for part in m.parts)
    assert not torch.allclose(m.parts[0].angles, m.parts[1].angles, atol=1e-3)  # type: ignore[attr-defined]
    prove(store, result.plan, BlockRunner(model, store.graph), tiny_models.tokens(model), 5e-6)


def test_noise_grows_with_the_span_of_its_group() -> None:
    grid = IntegerGrid(bits=3, group_size=16, scale="minmax")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noise = grid.fake(x.detach()) - x.detach()
    with scaled_ste(True):
        out = fake(grid, x)
    assert torch.allclose(out, grid.fake(x.detach()))
    out.sum().backward()
    groups, sums = x.detach().view(4, 2, 16), noise.view(4, 2, 16).sum(-1)
    expected = torch.ones(4, 2, 16)
    span = groups.amax(-1) - groups.amin(-1)
    expected.scatter_add_(-1, groups.argmax(-1, keepdim=True), (sums / span)[..., None])
    expected.scatter_add_(-1, groups.argmin(-1, keepdim=True), (-sums / span)[..., None])
    assert torch.allclose(x.grad.view(4, 2, 16), expected, atol=1e-4)  # type: ignore[union-attr]


def test_divergence_among_the_likeliest() -> None:
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    wanted, found = logits.log_softmax(-1), (1.2 * logits).log_softmax(-1)
    expected = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / 10
    assert float(mean_divergence(wanted, found, None)) == pytest.approx(float(expected), rel=1e-5)
    assert float(mean_divergence(wanted, found, 30)) == pytest.approx(float(expected), rel=1e-5)
    unlikely = found.clone().scatter_(-1, wanted.argmin(-1, keepdim=True), -50.0)
    assert float(mean_divergence(wanted, unlikely, 10)) == pytest.approx(
        float(mean_divergence(wanted, found, 10)), rel=1e-5
    )
    assert float(mean_divergence(wanted, unlikely, None)) > float(expected)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Along a curve of rotations, the loss changes as the gradient says (nothing is rounded here)."""
    model = tiny_models.build("llama_tied")
    recipe = gq.load_recipe("rtn", [*BASE, *SCALES, "learn.objective=weights", "activations=null"])
    store = open_model(model)
    plan = plan_folds(store.graph, recipe)
    places = learnable(plan, ("R1", "R2", "attn_in", "mlp_in", "R4"))
    matrices = started(plan, places)
    plan = with_values(plan, places, matrices)
    from gyroquant.finetuning.objectives import OptRotLoss

    loss = OptRotLoss(store, plan, places, list(setting(model, recipe, False).targets))
    _, gradients = loss.gradients(matrices, torch.zeros(0))
    for label in (next(label for label in places if label.startswith(site)) for site in ("attn_in", "mlp_in", "R4")):
        step = 1e-3 * torch.randn(matrices[label].shape, generator=torch.Generator().manual_seed(2))
        ends = [
            loss.gradients(matrices | {label: matrices[label] + sign * step}, torch.zeros(0))[0] for sign in (1, -1)
        ]
        slope = float((gradients[label] * step).sum())
        assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=5e-2, abs=1e-7)
    skew = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    skew = 1e-3 * (skew - skew.T)
    values = []
    for sign in (1, -1):
        turned = matrices | {"R1": (matrices["R1"][0] @ torch.linalg.matrix_exp(sign * skew))[None]}
        values.append(loss.gradients(turned, torch.zeros(0))[0])
    slope = float((gradients["R1"][0] * (matrices["R1"][0] @ skew)).sum())
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=2e-2)


def test_a_live_fold_is_the_fold() -> None:
    model = tiny_models.build("qwen2")
    recipe = gq.load_recipe("rtn", [*BASE, "transform.R4=hadamard"])
    store = open_model(model)
    plan = plan_folds(store.graph, recipe)
    places = learnable(plan, ("R1", "R2"))
    plan = with_values(plan, places, started(plan, places))
    tensors = store.read(store.graph.block_params(0))
    live = DifferentiableFold(plan, places, tensors, tensors)(plan)
    for name, value in fold(plan, tensors).items():
        assert torch.allclose(live[name], value, atol=1e-6)


@pytest.mark.parametrize("start", ["{method: walsh, block: 16}", "{method: hadamard, block: 16}"])
def test_blocks_stay_blocks_and_part_ways(start: str) -> None:
    _, _, _, result = learned("llama", "weights", f"transform.R1={start}", "learn.lr=0.3")
    m = next(m for site, m, _ in result.plan.folded if site.name == "R1")
    assert isinstance(m, BlockDiagonal)
    assert len(m.parts) == 4
    assert all(isinstance(part, Dense) for part in m.parts)
    assert not torch.allclose(m.parts[0].dense(), m.parts[1].dense(), atol=1e-3)


def test_rounded_weights_are_looked_at_when_they_are_rounded_to_nearest(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    from gyroquant.pipeline.job import prepare
    from gyroquant.pipeline.planning import learning_setting

    changes = [*BASE, "learn.objective=kl", "calibration.nsamples=4", "calibration.seqlen=32", "activations.bits=4"]
    for name, rounded in (("rtn", True), ("gptq", False)):
        recipe = gq.load_recipe(name, changes)
        job = prepare(folders["llama"], tmp_path / "out", recipe, corpus, tokenizer=tiny_models.tokenizer())
        setting = learning_setting(recipe, job.plan, job.tokens, job.targets, job.quantizers, job.compute_dtype)
        assert bool(setting.grids) == rounded


def test_a_model_in_memory_gets_learned_rotations() -> None:
    model = tiny_models.build("llama")
    base = [*BASE, *tiny_models.amount()]
    recipe = gq.load_recipe("rtn", [*base, "learn.objective=weights", "learn.steps=2", "learn.lr=0.5"])
    plain = tiny_models.build("llama")
    gq.transform(plain, gq.load_recipe("rtn", base))
    proof = gq.transform(model, recipe)
    assert proof.relative_logit_error < 5e-6
    assert not torch.allclose(model.model.embed_tokens.weight, plain.model.embed_tokens.weight, atol=1e-3)
    with pytest.raises(gq.InputError, match="needs text"):
        gq.transform(tiny_models.build("llama"), gq.load_recipe("rtn", [*base, "learn.objective=kl", "learn.steps=2"]))


@pytest.mark.parametrize("more", [[], SCALES], ids=["rotations", "scales"])
def test_a_stopped_run_goes_on_to_the_same_end(more: list[str], tmp_path: Path) -> None:
    options = ("learn.momentum=0.3", "learn.checkpoint_every=2", "learn.lr=0.3", *more)
    _, _, _, whole = learned("llama", "kl", *options, rounded=True)
    original = Loss.__subclasses__()[0].gradients
    calls = []

    def stopping(self: Loss, matrices: Any, batch: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, matrices, batch)

    from gyroquant.finetuning.objectives import EndToEnd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EndToEnd, "gradients", stopping)
        with pytest.raises(KeyboardInterrupt):
            learned("llama", "kl", *options, rounded=True, checkpoint=tmp_path / "state.safetensors")
        calls.clear()
        calls.extend([1] * 10)
        _, _, _, again = learned("llama", "kl", *options, rounded=True, checkpoint=tmp_path / "state.safetensors")
        assert len(calls) == 10 + 4
    assert again.losses == whole.losses
    ours, theirs = ([m.dense() for _, m, _ in r.plan.folded] for r in (again, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for change in ("seed=5", "transform.R4=hadamard"):  # a map that is not learned changes what is learned too
        options = (*[o for o in options if "R4" not in o], "learn.sites=[R1, R2]", change)
        _, _, _, other = learned("llama", "kl", *options, rounded=True, checkpoint=tmp_path / "state.safetensors")
        assert other.losses != whole.losses


def test_a_sample_is_drawn_from_everything() -> None:
    sample = Sample(2)
    for part in range(40):
        sample(torch.full((1000, 2), float(part)))
    assert len(sample.value) == Sample.rows
    counts = torch.bincount(sample.value[:, 0].long(), minlength=40)
    assert int(counts.min()) > 60
    assert int(counts.max()) < 150


def test_kurtosis_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(kurtosis(torch.randn(100, 4096, generator=generator))) == pytest.approx(3, abs=0.05)
    assert float(kurtosis(torch.rand(100, 4096, generator=generator) - 0.5)) == pytest.approx(1.8, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["transform.R1=null"], "learn.sites has R1, but the recipe puts no map there"),
        (["learn.objective=speed"], "objective"),
        (["learn.step=3"], "did you mean 'steps'"),
        (["transform.R1.online=true"], "R1.*runs online"),
        ([*SCALES, "learn.objective=kurtosis"], "kurtosis is measured at R1 and R2, not at attn_in"),
        (["learn.top=5"], "top is an option of the objective kl"),
        (["learn.objective=weights", "learn.gradient=scaled_ste"], "gradient: scaled_ste applies to rounding"),
        (["weights.solver=gptq"], "nothing is rounded during it"),
        (["transform.attn_in=identity", "learn.sites=[attn_in]"], "attn_in, which accepts diagonal maps.*unit_scale"),
        (["transform.R4=massdiff", "learn.sites=[R4]"], "R4, which accepts permutation maps.*unit_scale"),
        (["learn=true"], "learn holds settings such as sites"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_any_work(
    changes: list[str], message: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(gq.GyroquantError, match=message):
        run(folders["llama"], tmp_path / "out", "rtn", corpus, *BASE, "learn.steps=2", *changes)
    with pytest.raises(gq.UnsupportedModelError, match="LayerNorms"):
        run(folders["gpt2"], tmp_path / "out", "rtn", corpus, *BASE, "learn.steps=2")
    with pytest.raises(gq.UnsupportedModelError, match="single expert"):
        run(folders["qwen3_moe"], tmp_path / "out", "rtn", corpus, *BASE, *SCALES, "learn.steps=2")
    assert "LayerNorms" in inspect_model(tiny_models.build("gpt2"), changes=["weights.group_size=16"]).fits["optrot"]


def test_a_whole_run_learns_proves_and_rounds(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = [*BASE, "learn.steps=3", "learn.batch_size=2", "activations.bits=4", "kv_cache.bits=4", "weights.bits=4"]
    manifest = run(folders["llama_tied"], tmp_path / "out", "rtn", corpus, *changes)
    assert len(manifest["learned"]["losses"]) == 3
    assert manifest["proof"]["relative_logit_error"] < 5e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
