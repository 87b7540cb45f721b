"""Scales: SmoothQuant and AWQ do what their formulas say, by the vectors and weights of the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from selection import some

import gyroquant as gq
from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.calibration.observers import AbsMax
from gyroquant.maps import Diagonal, Map, hadamard
from gyroquant.models.folding.fold import FoldPlan, fold
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.folds import plan_folds
from gyroquant.recipes.schema import Recipe


def observe(store: WeightStore, plan: FoldPlan, wants: list[SiteMeasurement], ids: torch.Tensor) -> None:
    measure(store, plan, wants, ids)


def planned(model: torch.nn.Module, recipe: Recipe, ids: torch.Tensor) -> tuple[FoldPlan, dict[str, Map]]:
    store = open_model(model)
    plan = plan_folds(store.graph, recipe, lambda plan, wants: observe(store, plan, wants, ids))
    return plan, {site.label: m for site, m, _ in plan.folded}


def wants_of(
    model: torch.nn.Module, name: str, ids: torch.Tensor, structure: str = "diagonal"
) -> dict[str, SiteMeasurement]:
    """What there is to see at a model's sites, as it is."""
    store = open_model(model)
    wants = [SiteMeasurement(site, (AbsMax,)) for site in find_sites(store.graph, name, structure=structure)]
    observe(store, FoldPlan(store.graph), wants, ids)
    return {want.site.label: want for want in wants}


def column_max(want: SiteMeasurement) -> torch.Tensor:
    n = want.site.n
    return torch.stack([w.abs().amax(0).view(-1, n).amax(0) for w in want.weights()]).amax(0)


@pytest.mark.parametrize(
    ("model", "site"),
    [
        *((model, site) for model in ("llama", "qwen3_moe", "gpt2") for site in ("attn_in", "mlp_in")),
        *((model, "R4") for model in ("llama", "qwen3_moe")),  # GPT-2 has no gate there, so no scales
    ],
)
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_smoothing_makes_activations_and_weights_alike(model: str, site: str, alpha: float) -> None:
    """After it max|x_j| is max|x|^(1-alpha) max|W|^(1-alpha), and max|W_j| the same with alpha."""
    built = tiny_models.build(model)
    ids = tiny_models.tokens(built, batch=4)
    before = wants_of(built, site, ids)
    weights = {label: column_max(want) for label, want in before.items()}  # read before the fold changes them
    step = f"transform.{site}={{method: smooth, alpha: {alpha}}}"
    gq.transform(built, gq.load_recipe("rtn", [step, *tiny_models.amount(*ids.shape)]), ids)
    after = wants_of(built, site, ids)
    assert before.keys() == after.keys()
    for label, want in after.items():
        x, w = before[label].seen[AbsMax].value, weights[label]
        if x.max() > 0:
            both = x * w
            assert torch.allclose(want.seen[AbsMax].value, both.pow(1 - alpha), rtol=1e-3)
            assert torch.allclose(column_max(want), both.pow(alpha), rtol=1e-3)
        else:
            assert torch.equal(column_max(want), w)


def test_routers_do_not_count_and_experts_all_do() -> None:
    model = tiny_models.build("qwen3_moe")
    ids = tiny_models.tokens(model)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate.weight[:, 5] = 1e3
        mlp.experts.gate_up_proj[3, 7, 9] = 77.0
    want = next(iter(wants_of(model, "mlp_in", ids).values()))
    found = column_max(want)
    assert found[5] < 10
    assert found[9] == 77
    assert len(list(want.weights())) == 4


@pytest.mark.parametrize(
    "model", some(["llama_tied", "qwen3_moe", "gpt2", "gpt_neox", "phi3"], ["llama_tied", "qwen3_moe", "gpt2"])
)
@pytest.mark.parametrize("site", ["R1", "R2", "attn_in", "mlp_in", "R4", "linear"])
def test_weights_are_seen_as_everything_planned_leaves_them(model: str, site: str) -> None:
    """They are the parameters that folding the plan gives, whatever the maps and layouts."""
    built = tiny_models.build(model)
    store = open_model(built)
    ids = tiny_models.tokens(built)
    plan = FoldPlan(store.graph)
    for name in ("R1", "R2"):
        for place in find_sites(store.graph, name):
            plan.add(place, hadamard(place.n))
    for place in find_sites(store.graph, "R4"):
        plan.add(place, hadamard(place.n))
    sites = find_sites(store.graph, site, structure="orthogonal")
    wants = [SiteMeasurement(place, (AbsMax,)) for place in sites]
    observe(store, plan, wants, ids)
    outer, tensors = store.read(store.graph.outer_params()), {}
    for i in range(len(store.graph.blocks)):
        tensors |= store.read(store.graph.block_params(i))
    folded = fold(plan, tensors | outer, [*tensors, *outer, *store.graph.tied])
    ops = {op.weight: op for group in (*store.graph.blocks, store.graph.outer) for op in group.linears}
    for want in wants:
        expected: list[torch.Tensor] = []
        for port in want.site.readers:
            op = ops[port.param]
            if op.entry.quantize:
                value = folded[port.param].movedim(op.in_axis, -1)
                expected += list(value) if value.dim() == 3 else [value]
        seen = list(want.weights())
        assert len(seen) == len(expected) > 0
        for a, b in zip(seen, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
            assert a.shape[1] % want.site.n == 0


def test_a_measured_gain_is_in_the_weights_too() -> None:
    """At R1 a map absorbs the gains, so weights are shown with them before any map is planned."""
    model = tiny_models.build("llama")
    wants = wants_of(model, "R1", tiny_models.tokens(model), structure="orthogonal")
    first = next(wants["R1"].weights())
    layer = model.model.layers[0]
    assert torch.allclose(first, layer.self_attn.q_proj.weight * layer.input_layernorm.weight, atol=1e-6)


def test_silent_channels_keep_their_scale() -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, name).weight[:, 4] = 0
    recipe = gq.load_recipe("rtn", ["transform.attn_in=smooth"])
    _, maps = planned(model, recipe, tiny_models.tokens(model))
    m = maps["attn_in of block 0"]
    assert isinstance(m, Diagonal)
    assert m.values[3] == m.values[4] == 1
    assert (m.values != 1).sum() == 62


def test_scales_cannot_pass_a_nonlinearity_without_a_gate() -> None:
    model = tiny_models.build("gpt2")
    with pytest.raises(gq.UnsupportedModelError, match=r"there is no gate.*online=true"):
        gq.transform(model, gq.load_recipe("rtn", ["transform.R4=smooth"]), tiny_models.tokens(model))


def test_outlier_channels_round_better_smoothed(corpus: Path, tmp_path: Path) -> None:
    """W8A8 with an outlier channel behind the norms: smoothing must gain."""
    model = tiny_models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[5] *= 60
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    small = ["calibration.nsamples=4", "calibration.seqlen=32", "activations.bits=6"]
    error = {}
    for name, changes in (("smooth", []), ("plain", ["transform.attn_in=null", "transform.mlp_in=null"])):
        out = tmp_path / name
        gq.quantize(tmp_path / "model", gq.load_recipe("smoothquant", small + changes), corpus, out=out)
        error[name] = gq.evaluate(out, corpus, tmp_path / "model", window=32)["kl"]
    assert error["smooth"] < 0.5 * error["plain"]
