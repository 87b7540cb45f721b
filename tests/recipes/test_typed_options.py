"""Recipes made of typed options in Python are those that YAML gives."""

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import gyroquant as gq
from gyroquant.recipes.presets import find_recipe, preset_names
from gyroquant.registry import Registry


def made_again(value: Any) -> Any:
    """A typed option built by its constructor from the options that were set, without the tag that names its class."""
    if isinstance(value, BaseModel):
        registry = getattr(type(value), "registry", None)
        tags = {"method", "name", "grid"} if isinstance(registry, Registry) else set()
        return type(value)(**{key: made_again(getattr(value, key)) for key in value.model_fields_set - tags})
    if isinstance(value, dict):
        return {key: made_again(inner) for key, inner in value.items()}
    return tuple(map(made_again, value)) if isinstance(value, tuple) else value


CASES = [
    (name, effort) for name in preset_names() for effort in ("default", *(find_recipe(name)[0].get("efforts") or {}))
]


@pytest.mark.parametrize(("name", "effort"), CASES)
def test_presets_are_their_typed_options(name: str, effort: str) -> None:
    recipe = gq.load_recipe(name, effort=effort)
    again = made_again(recipe)
    assert again == recipe
    assert again is not recipe
    assert again.to_dict() == recipe.to_dict()


def test_methods_need_no_step_around_them() -> None:
    recipe = gq.Recipe(
        transform={
            "R1": gq.methods.Hadamard(random_signs=True),
            "R2": (gq.methods.Walsh(block=32), gq.methods.Hadamard()),
            "R4": gq.Step(method=gq.methods.Hadamard(block=64), online=True),
        },
        weights=gq.Weights(grid=gq.IntegerGrid(bits=3, group_size=64), solver=gq.Gptq(act_order=True)),
        activations=gq.Activations(grid=gq.IntegerGrid(bits=8, group_size=-1, scale="minmax")),
        finetune=gq.Finetune(steps=40),
    )
    text = """
        transform:
          R1: {method: hadamard, random_signs: true}
          R2: [{method: walsh, block: 32}, hadamard]
          R4: {method: hadamard, block: 64, online: true}
        weights: {bits: 3, group_size: 64, solver: {name: gptq, act_order: true}}
        activations: {bits: 8}
        finetune: {steps: 40}
    """
    assert recipe == gq.load_recipe(yaml.safe_load(text))
    assert gq.load_recipe(recipe) == recipe


def test_typed_options_and_plain_data_may_be_mixed() -> None:
    data = {"transform": {"R1": gq.methods.Hadamard()}, "weights": gq.Weights(solver=gq.Gptq())}
    assert gq.load_recipe(data) == gq.load_recipe({"transform": {"R1": "hadamard"}, "weights": {"solver": "gptq"}})


def test_defaults_are_those_of_an_empty_file() -> None:
    assert gq.Recipe() == gq.load_recipe({})
    assert gq.Weights() == gq.load_recipe({}).weights


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gq.Recipe(weigths=gq.Weights()), "has no key 'weigths'; did you mean 'weights'"),
        (lambda: gq.Recipe(transform={"R9": gq.methods.Hadamard()}), "has no key 'R9'"),
        (lambda: gq.Weights(solver="gtpq"), "did you mean 'gptq'"),
        (lambda: gq.Weights(solver=gq.Qronos(), target=gq.Target()), "corrects the input error by itself"),
    ],
)
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make()
    assert message in str(caught.value)
