"""Presets: every recipe and effort says what it said in the last release."""

import json
from pathlib import Path

import pytest

from gyroquant.recipes.compat import current
from gyroquant.recipes.presets import find_recipe, preset_names
from gyroquant.recipes.schema import load_recipe

# Recipe.to_dict() of every preset and effort in release 0.1, under the names of then.
NEW = {"aqlm", "butterflyquant", "gyro-gguf", "gyro-w2x", "omniquant", "qtip", "quip-sharp"}  # since then
RECORDED = json.loads((Path(__file__).parent / "data" / "presets.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_presets_are_those_of_the_last_release_except_for_descriptions(name: str) -> None:
    preset, effort = name.split()
    expected, found = current(RECORDED[name], warn=False), load_recipe(preset, effort=effort).to_dict()
    if preset in ("gyro-w2", "gyro-w3", "gyro-w4"):  # they did not round embeddings, and measured what bits are worth
        assert found.pop("embeddings") == found.pop("head")
        assert found.pop("keep_ties")
        assert found["transform"].pop("embeddings")
        for recipe in (expected, found):
            recipe["weights"].pop("allocate")
        if effort == "light":  # groups of 64 took the place of an allocation
            found["weights"]["group_size"] = expected["weights"]["group_size"]
    for step in found["transform"].values():  # ours were refused for models that one of their sites does not fit
        if isinstance(step, dict) and preset in ("gyro-w2", "gyro-w3", "gyro-w4"):
            assert step.pop("optional")
            assert step.pop("online", "fallback") == "fallback"
    if preset == "gyro-w4a4kv4":  # activations were asymmetric and not clipped; no token of the cache was exact
        assert found["activations"].pop("clip") == 0.8
        assert found["kv_cache"].pop("first_tokens") == 16
        for recipe in (expected, found):
            recipe.pop("activations")
            recipe.pop("kv_cache")
    for recipe in (expected, found):
        assert recipe.pop("description")  # for people: it does not change the result
    assert json.dumps(found) == json.dumps(expected)


def test_every_preset_and_effort_is_recorded() -> None:
    known = set(preset_names()) - NEW
    efforts = {name: ["default", *(find_recipe(name)[0].get("efforts") or {})] for name in known}
    assert set(RECORDED) == {f"{name} {effort}" for name, names in efforts.items() for effort in names}
