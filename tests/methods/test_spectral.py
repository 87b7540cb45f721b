"""BBT: scales are those of the formula and reach every reader; rotations of heads are principal axes, and exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from selection import some

import gyroquant as gq
from gyroquant import maps
from gyroquant.calibration.observers import MeanSquare, PaddedSpectrum
from gyroquant.errors import ProofError, UnsupportedModelError
from gyroquant.methods.rope_pairs import principal_angles
from gyroquant.methods.spectral import scales
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import Proof, prove
from gyroquant.models.graph.rope import Rope, rope_of
from gyroquant.models.graph.sites import HookPoint, find_sites
from gyroquant.models.stores.source import open_model

EXACT = 5e-6


def transformed(name: str, *changes: str) -> tuple[torch.nn.Module, Proof]:
    model = tiny_models.build(name)
    recipe = gq.load_recipe("rtn", ["weights.group_size=16", *changes, *tiny_models.amount()])
    return model, gq.transform(model, recipe, tiny_models.tokens(model))


def outputs(model: torch.nn.Module, module: str, ids: torch.Tensor) -> torch.Tensor:
    """What a linear layer writes, in front of what runs online behind it; shape (tokens, out)."""
    layer, seen = model.get_submodule(module), []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        hook.remove()
        return layer.forward(seen[0]).reshape(-1, layer.weight.shape[0]).double()


def energies(model: torch.nn.Module, module: str, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].flatten(0, -2).double().square().mean(0)


def test_scales_of_known_spectra() -> None:
    assert torch.allclose(scales(torch.full((48,), 3.0), 0.5), torch.tensor(2.0, dtype=torch.float64).sqrt())
    spike = scales(torch.tensor([0.0, 5.0, 0.0]), 0.5)
    assert spike.tolist() == pytest.approx([1, 2, 1])
    assert torch.equal(scales(torch.rand(9), 0.0), torch.ones(9, dtype=torch.float64))


@given(arrays("float32", (5, 12), elements=st.floats(-100, 100, width=32)))
def test_the_spectrum_is_that_of_sylvesters_matrix_on_padded_vectors(values: object) -> None:
    x = torch.as_tensor(values)
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    observer, plain = PaddedSpectrum(12), MeanSquare(12)
    for part in (x[:2], x[2:]):
        observer(part)
        plain(part)
    wanted = (torch.nn.functional.pad(x, (0, 4)) @ matrix / 4).double().square().mean(0)
    assert torch.allclose(observer.value, wanted, rtol=1e-4, atol=1e-2)
    assert torch.allclose(plain.value, x.double().square().mean(0), rtol=1e-4)
    assert float(observer.value.sum()) == pytest.approx(float(plain.value.sum()), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("site", "reader", "n"),
    [("attn_in", "self_attn.k_proj", 64), ("mlp_in", "mlp.up_proj", 64), ("R4", "mlp.down_proj", 96)],
)
@pytest.mark.parametrize("energy", ["corrected", "paper"])
def test_columns_are_scaled_by_what_enters_them(site: str, reader: str, n: int, energy: str) -> None:
    before = tiny_models.build("llama")
    ids = tiny_models.tokens(before)
    name = f"model.layers.1.{reader}"
    if energy == "corrected":
        share = energies(before, name, ids)
    else:
        observer = PaddedSpectrum(n)
        hook = before.get_submodule(name).register_forward_pre_hook(lambda _, args: observer(args[0].reshape(-1, n)))
        with torch.no_grad():
            before(ids)
        hook.remove()
        share = observer.value[:n]
    wanted = (1 + n * share / share.sum()).sqrt()
    after, proof = transformed("llama", f"transform.{site}={{method: spectral_scale, energy: {energy}}}")
    assert proof.relative_logit_error < EXACT
    ratio = after.get_submodule(name).weight.double() / before.get_submodule(name).weight.double()
    assert torch.allclose(ratio, wanted.expand_as(ratio), rtol=1e-4)


def test_energy_flattens_where_it_is_corrected() -> None:
    """The scaled channels' energies lie closer together; by the numbers of coefficients they need not."""
    before = tiny_models.build("llama")
    with torch.no_grad():
        before.model.layers[0].mlp.up_proj.weight[7] *= 20
    ids, name = tiny_models.tokens(before), "model.layers.0.mlp.down_proj"
    spread = energies(before, name, ids)
    changes = ["transform.R4=spectral_scale", "weights.group_size=16", *tiny_models.amount()]
    gq.transform(before, gq.load_recipe("rtn", changes), ids)
    after = energies(before, name, ids)
    assert float(after.max() / after.median()) < 0.2 * float(spread.max() / spread.median())


READERS = {
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.0.mlp.shared_expert.up_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
}


@pytest.mark.parametrize("forgotten", [None, *sorted(READERS)])
def test_routers_and_gates_of_shared_experts_are_scaled_too(
    forgotten: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = find_sites(open_model(tiny_models.build("qwen2_moe")).graph, "mlp_in")[0]
    assert {port.param for port in site.readers} >= READERS
    if forgotten is None:
        assert transformed("qwen2_moe", "transform.mlp_in=spectral_scale")[1].relative_logit_error < EXACT
        return
    apply = FoldPlan._apply
    monkeypatch.setattr(
        FoldPlan, "_apply", lambda self, ports, m: apply(self, tuple(p for p in ports if p.param != forgotten), m)
    )
    with pytest.raises(ProofError, match=r"folding mlp_in changed the model.*block 0"):
        transformed("qwen2_moe", "transform.mlp_in=spectral_scale")


@given(arrays("float64", (6, 9), elements=st.floats(-10, 10)), st.booleans())
def test_angles_make_second_moments_of_pairs_diagonal(values: object, interleaved: bool) -> None:
    x = torch.as_tensor(values)
    angles = principal_angles(x.T @ x, Rope(4, interleaved))
    turn = maps.PairRotation(9, angles, interleaved)
    first, second = turn.split(turn.apply(x))
    size = float(x.square().sum()) + 1
    assert float((first * second).sum(0).abs().max()) < 1e-9 * size
    assert bool((first.square().sum(0) >= second.square().sum(0) - 1e-9 * size).all())
    assert float(angles.abs().max()) <= torch.pi / 2 + 1e-12


KEYS = {
    "llama": ("model.layers.{}.self_attn.k_proj", slice(None)),
    "qwen2": ("model.layers.{}.self_attn.k_proj", slice(None)),
    "phi3": ("model.layers.{}.self_attn.qkv_proj", slice(64, 96)),
    "gpt_neox": ("gpt_neox.layers.{}.attention.query_key_value", slice(16, 32)),
    "cohere2": ("model.layers.{}.self_attn.k_proj", slice(None)),
}


# What of the recipe `pair-pca` an architecture has no place for, and why.
REFUSED = {
    **{(name, "qk"): r"q_norm and .*k_norm stand between" for name in tiny_models.QK_NORM},
    **{(name, "qk"): "no RoPE after it" for name in ("opt", "gpt2")},
    **{(name, "R4"): "there is no gate" for name in tiny_models.NO_GATE},
    **{(name, "attn_in"): "no site" for name in tiny_models.NO_NORM_IN_FRONT},
    **{(name, "mlp_in"): "no site" for name in (*tiny_models.NO_NORM_IN_FRONT, *tiny_models.ONE_NORM)},
}


@pytest.mark.parametrize("name", some(tiny_models.CONFIGS))
def test_the_recipe_is_exact_or_refused(name: str) -> None:
    """Pairs come out uncorrelated, whatever the layout of RoPE and of the weights that write them."""
    model = tiny_models.build(name)
    without = [site for other, site in REFUSED if other == name]
    for site in without:
        others = [f"transform.{other}=null" for other in ("qk", "attn_in", "mlp_in", "R4") if other != site]
        with pytest.raises(UnsupportedModelError, match=REFUSED[name, site]):
            gq.transform(model, gq.load_recipe("pair-pca", others), tiny_models.tokens(model))
    changes = ["weights.group_size=16", "transform.R2=hadamard", *(f"transform.{site}=null" for site in without)]
    changes += tiny_models.amount()
    proof = gq.transform(model, gq.load_recipe("pair-pca", changes), tiny_models.tokens(model))
    assert max(proof.relative_logit_error, proof.worst_block_error) < EXACT
    if name in KEYS:
        module, rows = KEYS[name]
        rope = rope_of(open_model(model).graph)
        assert rope is not None
        heads = outputs(model, module.format(1), tiny_models.tokens(model))[:, rows].unflatten(-1, (-1, 16))
        turn = maps.PairRotation(16, torch.zeros(rope.pairs), rope.interleaved)
        first, second = turn.split(heads)
        assert float((first * second).mean(0).abs().max()) < 1e-4 * float(heads.square().mean())
        assert rope.pairs == (2 if name == "gpt_neox" else 8)


@pytest.mark.parametrize("name", some(tiny_models.CONFIGS))
def test_principal_axes_of_heads_are_exact_online(name: str) -> None:
    """The matrix gain where there are norms; rows come out as principal axes, largest first."""
    model, proof = transformed(name, "transform.qk={method: head_pca, online: true}", "transform.R2=head_pca")
    assert max(proof.relative_logit_error, proof.worst_block_error) < EXACT
    if name in tiny_models.QK_NORM:
        size = open_model(model).graph.head_dim
        heads = outputs(model, "model.layers.0.self_attn.k_proj", tiny_models.tokens(model)).unflatten(-1, (-1, size))
        gram = torch.einsum("thi,thj->hij", heads, heads) / len(heads)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        assert float((gram - torch.diag_embed(diagonal)).abs().max()) < 1e-4 * float(gram.abs().max())
        assert bool((diagonal[:, :-1] >= diagonal[:, 1:] - 1e-4).all())


def test_one_map_runs_behind_each_projection() -> None:
    """Several maps of several heads are one, in the right order, and are counted once."""
    store = open_model(tiny_models.build("qwen3"))
    plan = FoldPlan(store.graph)
    for m in (maps.hadamard(32), maps.Diagonal(torch.arange(1.0, 33.0))):
        for site in find_sites(store.graph, "qk", online=True):
            plan.add(site, m, True)
    assert len(plan.online) == 2 * 2
    queries = plan.online[0].map
    assert queries.n == 4 * 32
    inverse = torch.block_diag(*[(maps.hadamard(32) @ maps.Diagonal(torch.arange(1.0, 33.0))).inverse().dense()] * 4)
    assert torch.allclose(queries.dense(), inverse)
    assert queries.storage_bits() == 2 * 32 * 32
    prove(
        store, plan, BlockRunner(store.skeleton(), store.graph), tiny_models.tokens(tiny_models.build("qwen3")), EXACT
    )


def proved(name: str, m: maps.Map, online: bool | None, spoil: object = None) -> Proof:
    model = tiny_models.build(name)
    store = open_model(model)
    plan = FoldPlan(store.graph)
    for site in find_sites(store.graph, "qk", online=bool(online)):
        plan.add(site, m, online)
    if callable(spoil):
        spoil(plan)
    return prove(store, plan, BlockRunner(model, store.graph), tiny_models.tokens(model), EXACT)


def test_a_reflection_is_refused_and_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    proved("llama", maps.PairRotation(16, torch.ones(8)), None)
    flipped = maps.PairRotation(16, torch.ones(8)) @ maps.Signs(torch.tensor([1] * 8 + [-1] * 8, dtype=torch.int8))
    with pytest.raises(UnsupportedModelError, match="reflections and mixtures of pairs do not commute with RoPE"):
        proved("llama", flipped, None)
    monkeypatch.setattr(Rope, "commutes", lambda self, m: True)
    with pytest.raises(ProofError, match="folding qk changed the model"):
        proved("llama", flipped, None)


@pytest.mark.parametrize("bias", ["q_proj.bias", "k_proj.bias"])
def test_a_forgotten_bias_is_caught(bias: str) -> None:
    def forget(plan: FoldPlan) -> None:
        del plan.edits[f"model.layers.1.self_attn.{bias}"]

    turn = maps.PairRotation(16, torch.ones(8))
    proved("qwen2", turn, None)
    with pytest.raises(ProofError, match=r"folding qk changed .* The fault lies in block 1"):
        proved("qwen2", turn, None, forget)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_symmetric_gain_is_caught(name: str) -> None:
    """diag(gamma) U in place of U^T diag(gamma) U: what is turned again behind the norm meets RoPE in a wrong basis."""
    rotation = maps.random_orthogonal(32, torch.Generator().manual_seed(3))

    def symmetric(plan: FoldPlan) -> None:
        for norm in (norm for group in plan.graph.blocks for norm in group.norms if norm.entry.reads in ("q", "k")):
            plan.online.append(OnlineMap(HookPoint("output", norm.module), rotation))

    proved(name, rotation, True)
    with pytest.raises(ProofError, match="folding qk changed the model"):
        proved(name, rotation, True, symmetric)


def test_layers_that_rotate_different_shares_are_refused() -> None:
    model = tiny_models.build("gemma3")
    model.config.rope_parameters["full_attention"]["partial_rotary_factor"] = 0.5
    with pytest.raises(UnsupportedModelError, match="different shares of a head"):
        find_sites(open_model(model).graph, "qk")


def test_a_matrix_gain_is_saved_and_loaded(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = ["transform.qk={method: head_pca, online: true}", "weights.bits=8", "weights.group_size=16"]
    small = ["calibration.nsamples=4", "calibration.seqlen=32", "calibration.dtype=float32"]
    out = tmp_path / "out"
    gq.quantize(folders["qwen3"], gq.load_recipe("rtn", [*changes, *small]), corpus, out)
    ids = tiny_models.tokens(tiny_models.build("qwen3"))
    with torch.no_grad():
        wanted, got = tiny_models.build("qwen3")(ids).logits, gq.load(out, dtype=torch.float32)(ids).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
