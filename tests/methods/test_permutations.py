"""MassDiff is the greedy of the paper; its bound holds; it is chosen by what the model really computes."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gyroquant as gq
from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.calibration.observers import AbsMax, MeanAbs
from gyroquant.maps import Permutation, blocks, hadamard
from gyroquant.methods.permutations import massdiff, zigzag
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.folds import plan_folds


def greedy(x: torch.Tensor, size: int) -> list[int]:
    """The definition, on all tokens: seeds first, then always the block whose mean l1 mass stays smallest."""
    mass = x.abs().mean(0).double()
    order = torch.argsort(mass, descending=True, stable=True).tolist()
    count = len(order) // size
    parts = [[channel] for channel in order[:count]]
    for channel in order[count:]:
        free = [i for i, part in enumerate(parts) if len(part) < size]
        best = min(free, key=lambda i: (float(sum(mass[c] for c in parts[i])), i))
        parts[best].append(channel)
    return [channel for part in parts for channel in part]


vectors = arrays("float64", st.integers(1, 6).map(lambda k: 8 * k), elements=st.floats(0, 1e4, width=32))


@given(vectors, st.sampled_from([2, 4, 8]))
def test_massdiff_is_the_greedy_of_the_paper(mass: object, size: int) -> None:
    x = torch.as_tensor(mass)[None]
    assert massdiff(x[0], size).tolist() == greedy(x, size)


@settings(deadline=None)
@given(arrays("float64", (3, 32), elements=st.floats(-1e3, 1e3, width=32)), st.sampled_from([4, 8, 16, 32]))
def test_no_entry_exceeds_the_mass_of_its_block(values: object, size: int) -> None:
    """max |x R| <= max_j ||x_Bj||_1 / sqrt(b) for any permutation and block Hadamard (arXiv 2601.22347)."""
    x = torch.as_tensor(values)
    rotated = blocks(hadamard(size), 32).apply(x)
    bound = x.abs().view(3, -1, size).sum(-1).amax(-1) / size**0.5
    assert bool((rotated.abs().amax(-1) <= bound * (1 + 1e-12) + 1e-12).all())


def test_massdiff_evens_out_what_sorting_piles_up() -> None:
    mass = torch.rand(512, generator=torch.Generator().manual_seed(0)).exp().pow(6)

    def heaviest(order: torch.Tensor) -> float:
        return float(mass[order].view(-1, 32).sum(1).max())

    mean = float(mass.sum() / 16)
    assert heaviest(massdiff(mass, 32)) < 1.01 * mean
    assert heaviest(massdiff(mass, 32)) <= heaviest(zigzag(mass, 32)) < 1.5 * mean
    assert heaviest(torch.argsort(mass, descending=True)) > 3 * mean


def test_zigzag_deals_to_and_fro() -> None:
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("site", ["R1", "R4"])
def test_it_is_chosen_by_what_enters_the_layers(model: str, site: str) -> None:
    """The measured mass is that of the folded model's own vectors, experts and gains included."""
    built = tiny_models.build(model)
    store = open_model(built)
    ids = tiny_models.tokens(built)
    changes = [f"transform.{site}=[{{method: massdiff, block: 16}}]", "weights.group_size=16"]
    recipe = gq.load_recipe("rtn", [*changes, *tiny_models.amount(*ids.shape)])
    found = {}

    def look(plan: FoldPlan, wants: list[SiteMeasurement]) -> None:
        measure(store, plan, wants, ids)
        found.update({want.site.label: want.seen[MeanAbs] for want in wants})

    plan = plan_folds(store.graph, recipe, look)
    gq.transform(built, recipe, ids)
    again = open_model(built)
    wants = [
        SiteMeasurement(place, (MeanAbs, AbsMax)) for place in find_sites(again.graph, site, structure="permutation")
    ]
    measure(again, FoldPlan(again.graph), wants, ids)
    maps = {place.label: m for place, m, _ in plan.folded}
    assert len(maps) == len(wants)
    for want in wants:
        seen, m = found[want.site.label], maps[want.site.label]
        assert seen.count == want.seen[MeanAbs].count
        if isinstance(m, Permutation) and seen.count:
            expected = seen.value[m.index]
            assert torch.allclose(want.seen[MeanAbs].value, expected, rtol=1e-3)


def test_a_blockwise_rotation_follows_its_permutation() -> None:
    model = tiny_models.build("llama")
    steps = "[{method: massdiff, block: 16}, {method: hadamard, block: 16}]"
    changes = [f"transform.R4={steps}", f"transform.R1={steps}", "weights.group_size=16"]
    recipe = gq.load_recipe("rtn", [*changes, *tiny_models.amount()])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(gq.InputError, match="measures the model on text"):
        gq.transform(model, recipe)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    proof = gq.transform(model, recipe, tiny_models.tokens(model))
    assert proof.relative_logit_error < 5e-6
    kinds = [type(m).__name__ for m in (model.model.layers[0].mlp.down_proj._forward_pre_hooks.values())]
    assert kinds == ["_MapInput"]


def test_experts_get_a_permutation_each() -> None:
    graph = open_model(tiny_models.build("qwen3_moe")).graph
    assert len(find_sites(graph, "R4", structure="permutation")) == 2 * 4
    assert len(find_sites(graph, "R4")) == 2


def test_blocks_that_do_not_fit_are_refused_before_any_text_is_read() -> None:
    model = tiny_models.build("llama")
    recipe = gq.load_recipe("rtn", ["transform.R4={method: massdiff, block: 40}"])
    with pytest.raises(gq.RecipeError, match="blocks of 40 do not divide; the nearest"):
        gq.transform(model, recipe, tiny_models.tokens(model))


def test_a_measurement_that_breaks_off_leaves_the_model_alone() -> None:
    model = tiny_models.build("llama")
    store = open_model(model)

    def broken(n: int) -> object:
        def see(x: torch.Tensor) -> None:
            raise KeyboardInterrupt

        return see

    want = SiteMeasurement(find_sites(store.graph, "R4")[0], (broken,))
    with pytest.raises(KeyboardInterrupt):
        measure(store, FoldPlan(store.graph), [want], tiny_models.tokens(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
