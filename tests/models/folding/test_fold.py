"""Folding is exact, for every architecture, site and kind of map; what cannot be exact is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tiny_models
import torch
from selection import some

from gyroquant import maps
from gyroquant.errors import ProofError, UnsupportedModelError
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import AbsorbGain, ApplyMap, DivideBias, FoldPlan
from gyroquant.models.folding.prove import Proof, prove
from gyroquant.models.graph.sites import Site, find_sites
from gyroquant.models.stores.source import open_model

EXACT = 5e-6
Choose = Callable[[Site], maps.Map]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def rotation(site: Site) -> maps.Map:
    return maps.random_signs(site.n, generator()) @ maps.hadamard(site.n)


def dense_rotation(site: Site) -> maps.Map:
    return maps.random_orthogonal(site.n, generator())


def blockwise(site: Site) -> maps.Map:
    return maps.blocks(maps.walsh(16), site.n)


def invertible(site: Site) -> maps.Map:
    """Not orthogonal, with singular values between 0.5 and 1.5."""
    return maps.Dense((dense_rotation(site) @ scaling(site)).dense())


def scaling(site: Site) -> maps.Map:
    return maps.Diagonal(torch.rand(site.n, generator=generator(), dtype=torch.float64) + 0.5)


def turns(site: Site) -> maps.Map:
    """Any map that commutes with RoPE: a rotation and a factor for each pair; any at all without RoPE."""
    if site.rope is None:
        return invertible(site)
    pairs = site.rope.pairs
    turn = maps.PairRotation(site.n, 3 * torch.randn(pairs, generator=generator()), site.rope.interleaved)
    factors = torch.rand(pairs, generator=generator(), dtype=torch.float64) + 0.5
    both = factors.repeat_interleave(2) if site.rope.interleaved else factors.repeat(2)
    return turn @ maps.Diagonal(torch.cat([both, torch.full((site.n - 2 * pairs,), 0.7, dtype=torch.float64)]))


def permutation(site: Site) -> maps.Map:
    return maps.Permutation(torch.randperm(site.n, generator=generator()))


# site, map, whether it is asked to run online
CASES: dict[str, tuple[str, Choose, bool | None]] = {
    "R1 rotation": ("R1", rotation, None),
    "R1 dense": ("R1", dense_rotation, None),
    "R1 blocks": ("R1", blockwise, None),
    "R1 online": ("R1", rotation, True),
    "R2 rotation": ("R2", rotation, None),
    "R2 invertible": ("R2", invertible, None),
    "attn_out": ("attn_out", invertible, None),
    "qk": ("qk", turns, None),
    "qk online": ("qk", invertible, True),
    "R3": ("R3", rotation, None),
    "R4 rotation": ("R4", rotation, None),
    "R4 permutation": ("R4", permutation, None),
    "R4 invertible": ("R4", invertible, None),
    "attn_in scaling": ("attn_in", scaling, None),
    "mlp_in scaling": ("mlp_in", scaling, None),
    "attn_in online": ("attn_in", invertible, True),
    "linear": ("linear", rotation, None),
}
# Why a case cannot be fused in an architecture; everything that is not listed must be exact.
BEHIND = "cannot pass it"
REFUSED = {
    **{(name, case): BEHIND for name in tiny_models.POST_NORM for case in CASES if case.startswith("R1 ")},
    **{
        (name, case): "no site"
        for name in tiny_models.NO_NORM_IN_FRONT
        for case in ("attn_in scaling", "mlp_in scaling", "attn_in online")
    },
    **{(name, "mlp_in scaling"): "no site" for name in tiny_models.ONE_NORM},
    **{(name, "qk"): "k_norm stand between" for name in tiny_models.QK_NORM},
}
for _name in tiny_models.POST_NORM:
    del REFUSED[_name, "R1 online"]


def folded(name: str, *cases: tuple[str, Choose, bool | None]) -> Proof:
    model = tiny_models.build(name)
    store = open_model(model)
    plan = FoldPlan(store.graph)
    for site_name, choose, online in cases:
        for site in find_sites(store.graph, site_name, online=bool(online)):
            plan.add(site, choose(site), online)
    return prove(store, plan, BlockRunner(model, store.graph), tiny_models.tokens(model), EXACT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_fold_is_exact_or_refused(name: str, case: str) -> None:
    if (name, case) in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name, case]):
            folded(name, CASES[case])
    else:
        proof = folded(name, CASES[case])
        assert proof.relative_logit_error < EXACT
        assert proof.worst_block_error < EXACT


@pytest.mark.parametrize("name", some(tiny_models.CONFIGS))
def test_all_sites_at_once(name: str) -> None:
    online = True if (name, "R1 rotation") in REFUSED else None
    queries = ("qk", invertible, True) if (name, "qk") in REFUSED else ("qk", turns, None)
    heads = ("attn_out", rotation, None)
    others = (("R2", invertible, None), heads, queries, ("R3", rotation, None), ("R4", rotation, None))
    folded(name, ("R1", rotation, online), *others)


def test_several_maps_at_one_site() -> None:
    folded("llama", ("R1", rotation, None), ("R1", blockwise, None), ("R4", permutation, None), ("R4", blockwise, None))


def test_maps_of_norms_compose_with_rotations_of_the_stream() -> None:
    folded("gpt2", ("R1", rotation, None), ("attn_in", scaling, None), ("mlp_in", scaling, None))


def test_the_identity_edits_nothing() -> None:
    store = open_model(tiny_models.build("llama"))
    plan = FoldPlan(store.graph)
    plan.add(find_sites(store.graph, "R1")[0], maps.Identity(64))
    assert not plan.edits
    assert not plan.online
    assert len(plan.folded) == 1


def test_layer_norm_models_get_maps_that_keep_the_mean() -> None:
    store = open_model(tiny_models.build("opt"))
    plan = FoldPlan(store.graph)
    plan.add(find_sites(store.graph, "R1")[0], maps.hadamard(64))
    ones = torch.ones(64, dtype=torch.float64)
    assert torch.allclose(plan.folded[0][1].apply(ones), ones)
    store = open_model(tiny_models.build("llama"))
    plan = FoldPlan(store.graph)
    plan.add(find_sites(store.graph, "R1")[0], maps.hadamard(64))
    assert isinstance(plan.folded[0][1], maps.Hadamard)  # RMSNorm models are never bent to the mean


@pytest.mark.parametrize(
    ("site", "choose", "online", "why"),
    [
        ("R1", invertible, None, "orthogonal"),
        ("R1", scaling, None, "orthogonal"),
        ("attn_in", rotation, None, "diagonal"),
        ("R3", invertible, True, "orthogonal"),
        ("qk", rotation, None, "do not commute with RoPE.*set transform.qk.online=true"),
        ("R2", rotation, True, "no hook point"),
        ("R1", lambda site: maps.hadamard(32), None, "32"),
    ],
)
def test_maps_that_do_not_fit_are_refused(site: str, choose: Choose, online: bool | None, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        folded("llama", (site, choose, online))


def break_plans(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[FoldPlan], None]) -> None:
    """Every finished plan is spoiled before it is proved."""
    original = FoldPlan.add

    def add(self: FoldPlan, site: Site, m: maps.Map, online: bool | None = None) -> None:
        original(self, site, m, online)
        spoil(self)

    monkeypatch.setattr(FoldPlan, "add", add)


def edits_of(plan: FoldPlan, part: str) -> Iterator[str]:
    return (name for name in plan.edits if part in name)


def forget_bias(plan: FoldPlan) -> None:
    for name in list(edits_of(plan, "layers.1.self_attn.v_proj.bias")):
        del plan.edits[name]


def forget_gain(plan: FoldPlan) -> None:
    for name in edits_of(plan, "layers.1.mlp.up_proj"):
        plan.edits[name] = [e for e in plan.edits[name] if not isinstance(e, AbsorbGain)]


def forget_reader(plan: FoldPlan) -> None:
    for name in edits_of(plan, "layers.1.self_attn.k_proj.weight"):
        plan.edits[name] = [e for e in plan.edits[name] if not isinstance(e, ApplyMap)]


def forget_embedding(plan: FoldPlan) -> None:
    plan.edits.pop("model.embed_tokens.weight", None)


def forget_norm_bias(plan: FoldPlan) -> None:
    for name in list(plan.edits):
        if "layers.1.self_attn_layer_norm.bias" in name:
            plan.edits[name] = [e for e in plan.edits[name] if not isinstance(e, DivideBias)]


@pytest.mark.parametrize(
    ("name", "site", "spoil", "culprit"),
    [
        ("qwen2", "R2", forget_bias, "block 1"),
        ("llama", "R1", forget_gain, "block 1"),
        ("llama", "R1", forget_reader, "block 1"),
        ("llama", "R1", forget_embedding, "the embeddings"),
        ("opt", "R1", forget_norm_bias, "block 1"),
    ],
)
def test_a_broken_fold_is_caught_and_named(
    monkeypatch: pytest.MonkeyPatch, name: str, site: str, spoil: Callable[[FoldPlan], None], culprit: str
) -> None:
    folded(name, (site, rotation, None))
    break_plans(monkeypatch, spoil)
    with pytest.raises(ProofError, match=culprit) as caught:
        folded(name, (site, rotation, None))
    assert site in str(caught.value)


def test_a_norm_bias_behind_a_zero_gain_is_refused() -> None:
    model = tiny_models.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[3] = 0.0
    store = open_model(model)
    plan = FoldPlan(store.graph)
    plan.add(find_sites(store.graph, "R1")[0], maps.hadamard(64))
    with pytest.raises(UnsupportedModelError, match=r"transformer.h.1.ln_2 has a channel with gain 0"):
        prove(store, plan, BlockRunner(model, store.graph), tiny_models.tokens(model), EXACT)


def test_a_zero_gain_without_bias_is_exact() -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0.0
    store = open_model(model)
    plan = FoldPlan(store.graph)
    plan.add(find_sites(store.graph, "R1")[0], maps.hadamard(64))
    prove(store, plan, BlockRunner(model, store.graph), tiny_models.tokens(model), EXACT)


def test_large_parameters_are_folded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from gyroquant.models.folding import fold as module

    store = open_model(tiny_models.build("qwen3_moe"))
    plan = FoldPlan(store.graph)
    for name in ("R1", "R4"):
        for site in find_sites(store.graph, name):
            plan.add(site, rotation(site))
    tensors = store.read(store.graph.block_params(0))
    whole = module.fold(plan, tensors)
    monkeypatch.setattr(module, "_CHUNK", 100)
    for name, tensor in module.fold(plan, tensors).items():
        assert torch.equal(tensor, whole[name]), name
