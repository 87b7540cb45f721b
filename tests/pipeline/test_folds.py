"""Which maps a recipe gets on a model that takes only some of them, and that kept maps return to their places."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.folds import dump_plan, load_plan, plan_folds

STEP = "{method: hadamard, random_signs: true, optional: true, online: %s}"


def recipe(online: str) -> Any:
    sites = [f"transform.{site}={STEP % 'null'}" for site in ("R2", "R4", "embeddings")]
    return gq.load_recipe("rtn", [f"transform.R1={STEP % online}", *sites])


@pytest.mark.parametrize("online", ["null", "fallback"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_kept_maps_return_to_their_places(name: str, online: str) -> None:
    """A step that is left out takes none of them."""
    graph = open_model(tiny_models.build(name)).graph
    plan = plan_folds(graph, recipe(online))
    again = load_plan(graph, recipe(online), *dump_plan(plan))
    assert [site.label for site, _, _ in again.folded] == [site.label for site, _, _ in plan.folded]
    for (_, m, on), (_, other, also) in zip(plan.folded, again.folded, strict=True):
        assert on == also
        assert torch.equal(m.dense(), other.dense())
    assert again.left_out == plan.left_out


def test_a_fallback_runs_online_where_nothing_can_be_fused() -> None:
    for name, expected in (("llama", [False]), ("gemma3", [True] * 4)):
        plan = plan_folds(open_model(tiny_models.build(name)).graph, recipe("fallback"))
        assert [online for site, _, online in plan.folded if site.name == "R1"] == expected
        assert not plan.left_out
    plan = plan_folds(open_model(tiny_models.build("gemma3")).graph, recipe("null"))
    assert len(plan.left_out) == 1
    assert plan.left_out[0].startswith("R1 is left out")


def test_another_word_is_refused() -> None:
    with pytest.raises(RecipeError, match="online is true, false, fallback or left out, not 'maybe'"):
        recipe("maybe")
