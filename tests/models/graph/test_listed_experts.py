"""Experts as a list of modules fold like stacked ones, and are observed where all tokens pass."""

import listed_experts
import tiny_models
import torch

from gyroquant import maps
from gyroquant.calibration.observers import SecondMoments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.source import open_model


def test_listed_experts_fold_exactly() -> None:
    model = listed_experts.build("qwen3_moe")
    ids = tiny_models.tokens(model)
    assert torch.allclose(model(ids).logits, tiny_models.build("qwen3_moe")(ids).logits, atol=1e-5)
    store = open_model(model)
    plan = FoldPlan(store.graph)
    for name in ("R1", "R2", "R4"):
        for site in find_sites(store.graph, name):
            plan.add(site, maps.hadamard(site.n))
    assert len(plan.online) == 8
    prove(store, plan, BlockRunner(model, store.graph), ids, 5e-6)


def test_what_all_experts_read_is_observed_on_every_token() -> None:
    """Not on those that the router sends to one of them."""
    model = listed_experts.build("qwen3_moe")
    store, ids = open_model(model), tiny_models.tokens(model)
    stream = Stream(BlockRunner(model, store.graph), ids, store.read(store.graph.outer_params()))
    with observing(model, store.graph.blocks[0], [], SecondMoments) as observed:
        stream.run(0, store.read(store.graph.block_params(0)), keep=False)
    assert observed["mlp_in", None].count == ids.numel()
    assert sum(observed[f"expert{e}.act", None].count for e in range(4)) == 2 * ids.numel()
