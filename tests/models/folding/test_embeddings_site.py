"""Maps of the rows of embeddings and heads, for models whose residual stream keeps its basis."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Identity, Map, random_orthogonal
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import HookPoint, find_sites
from gyroquant.models.stores.base import ModuleStore


def rotation(n: int, seed: int) -> Map:
    return random_orthogonal(n, torch.Generator().manual_seed(seed))


def planned(store: ModuleStore, maps: int = 1) -> FoldPlan:
    plan = FoldPlan(store.graph)
    for seed in range(maps):
        for site in find_sites(store.graph, "embeddings"):
            plan.add(site, rotation(site.n, seed))
    return plan


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "cohere", "llama", "gpt2", "opt", "granite", "mistral3"])
def test_rows_turn_and_the_model_stays(name: str) -> None:
    """Scaled embeddings, positions, multipliers, caps of logits and tables that images do not pass."""
    store = ModuleStore(tiny_models.build(name))
    plan, outer = planned(store), store.read(store.graph.outer_params())
    assert plan.unties(outer) == ()
    proof = prove(store, plan, BlockRunner.of(store), tiny_models.tokens(store.model))
    assert proof.relative_logit_error < 5e-6
    (table, *_), folded = store.graph.tables, plan.read_outer(store)
    assert not torch.allclose(folded[table.weight], outer[table.weight].float(), atol=1e-3)


def test_a_tied_head_shares_the_rows_that_are_turned() -> None:
    store = ModuleStore(tiny_models.build("gemma3"))
    (table,), (head,) = store.graph.tables, store.graph.outer.linears
    assert [op.hook_point for op in planned(store).online] == [
        HookPoint("output", table.module),
        HookPoint("input", head.module),
    ]
    edits = planned(store).edits
    assert len(edits[table.weight]) == len(edits[head.weight]) == 1


def test_a_fused_map_of_the_residual_stream_turns_the_rows_already() -> None:
    store = ModuleStore(tiny_models.build("llama_tied"))
    (stream,), (site,) = find_sites(store.graph, "R1"), find_sites(store.graph, "embeddings")
    plan = FoldPlan(store.graph, keeps_ties=True)
    plan.add(stream, Identity(stream.n))
    plan.add(site, rotation(site.n, 0))
    plan = FoldPlan(store.graph, keeps_ties=True)
    plan.add(stream, rotation(stream.n, 0))
    with pytest.raises(UnsupportedModelError, match=r"a map at R1 changes the rows of model\.embed_tokens already"):
        plan.add(site, rotation(site.n, 0))
