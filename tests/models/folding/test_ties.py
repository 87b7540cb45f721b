"""A head that is tied to the embedding stays tied when the residual stream is rotated."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from gyroquant.maps import Dense
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import HookPoint, find_sites
from gyroquant.models.stores.base import ModuleStore


def rotation(n: int, seed: int) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    return Dense(torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0])


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt", "granite", "cohere"])
@pytest.mark.parametrize("rotations", [1, 2])
def test_the_tie_survives_rotations_of_the_residual_stream(name: str, rotations: int) -> None:
    """Gains, LayerNorms with biases and multipliers stand between the stream and the head."""
    store = ModuleStore(tiny_models.build(name, **({"tie_word_embeddings": True} if name == "cohere" else {})))
    (site,) = find_sites(store.graph, "R1")
    plan = FoldPlan(store.graph, keeps_ties=True)
    for seed in range(rotations):
        plan.add(site, rotation(site.n, seed))
    outer = store.read(store.graph.outer_params())
    assert store.graph.tied
    assert plan.unties(outer) == ()
    norm, head = store.graph.outer.norms[-1], store.graph.outer.linears[-1]
    assert [op.hook_point for op in plan.online] == [HookPoint("input", norm.module), HookPoint("input", head.module)]
    proof = prove(store, plan, BlockRunner.of(store), tiny_models.tokens(store.model))
    assert proof.relative_logit_error < 5e-6
    changed = FoldPlan(store.graph)
    changed.add(site, rotation(site.n, 0))
    assert changed.unties(outer) == tuple(store.graph.tied)


def test_a_head_of_its_own_takes_the_gain_as_ever() -> None:
    store = ModuleStore(tiny_models.build("llama"))
    (site,) = find_sites(store.graph, "R1")
    plan = FoldPlan(store.graph, keeps_ties=True)
    plan.add(site, rotation(site.n, 0))
    assert not plan.online
    assert prove(store, plan, BlockRunner.of(store), tiny_models.tokens(store.model)).relative_logit_error < 5e-6
