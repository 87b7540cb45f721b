"""Sections of a recipe: registered classes, also such as register late, and grids beside a section's own options."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.grids import Grid, IntegerGrid
from gyroquant.methods import Method
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import Solver
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps.base import LayerStep
from gyroquant.rounding.steps.refine import Refine


@pytest.fixture
def late() -> Iterator[None]:
    """Classes that register after the models of recipes were built, as those of a plug-in do."""
    registries = (Method.registry, Solver.registry, Grid.registry, LayerStep.registry)
    with ExitStack() as stack:
        for registry in registries:
            stack.enter_context(registry.restored())  # type: ignore[attr-defined]

        class Late(RoundToNearest):
            name: Literal["late"] = "late"  # type: ignore[assignment]
            share: Annotated[float, Field(ge=0, le=1)] = 0.5

        class LateMethod(gq.methods.Identity):
            method: Literal["late_identity"] = "late_identity"  # type: ignore[assignment]

        class LateGrid(IntegerGrid):
            grid: Literal["late_grid"] = "late_grid"  # type: ignore[assignment]
            has_bit_widths = False
            plain_integers = False
            wide: bool = False

        class LateStep(Refine):
            key: ClassVar[str] = "late_step"
            extra: Annotated[int, Field(gt=0)] = 1

        yield


@pytest.mark.usefixtures("late")
def test_classes_that_register_late_are_known() -> None:
    data = {
        "transform": {"R1": "late_identity"},
        "weights": {"solver": {"name": "late", "share": 0.25}, "grid": "late_grid", "bits": 2, "wide": True},
    }
    recipe = load_recipe(data)
    assert recipe.weights.solver.name == "late"
    assert recipe.weights.grid.model_dump()["wide"]
    assert recipe.to_dict()["weights"]["solver"] == {"name": "late", "share": 0.25}
    assert load_recipe(recipe.to_dict()) == recipe
    assert type(recipe.transform["R1"][0].method) is getattr(gq.methods, "LateMethod")  # noqa: B009


@pytest.mark.usefixtures("late")
def test_a_step_that_registers_late_is_a_key_of_weights() -> None:
    recipe = load_recipe("gptq", ["weights.late_step={passes: 2}"])
    assert "late_step" in [step.key for step in recipe.weights.steps]
    assert recipe.to_dict()["weights"]["late_step"]["passes"] == 2
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe("gptq", ["weights.late_step=true"]) != load_recipe("gptq", ["weights.late_step=false"])


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["weights.solver=lat"], "weights.solver.name is 'lat'; did you mean 'late'"),
        (["weights.solver={name: late, shar: 1}"], "weights.solver has no key 'shar'; did you mean 'share'"),
        (["weights.solver={name: late, share: 7}"], "less than or equal to 1 for name late (given: 7)"),
        (
            ["weights.grid=late_grid", "weights.wid=true"],
            "weights of grid late_grid has no key 'wid'; did you mean 'wide'",
        ),
        (["weights.grid=late_grid", "weights.allocate.budget=3"], "the grid late_grid has only one number of bits"),
        (["weights.grid=late_grid", "weights.solver=auto_round"], "auto_round rounds to integer grids only"),
        (["kv_cache={bits: 4, grid: late_grid}"], "the KV cache takes integer grids only, not late_grid"),
    ],
)
def test_their_options_are_checked_like_any(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gsr", changes)
    assert message in str(caught.value)


def test_a_name_that_is_no_class_is_not_found() -> None:
    assert not hasattr(gq.methods, "Hadamrd")
    assert not hasattr(gq.methods, "hadamrd")


def test_an_override_keeps_what_it_does_not_set() -> None:
    weights: dict[str, Any] = {"bits": 2, "group_size": 64, "symmetric": True}
    overrides = [{"layers": ["down_proj"], "bits": 3}, {"layers": ["k_proj"], "grid": "mxfp4"}]
    recipe = load_recipe({"weights": weights | {"overrides": overrides}})
    assert recipe.weights.grid_of("model.layers.0.mlp.down_proj") == IntegerGrid(bits=3, group_size=64, symmetric=True)
    assert recipe.weights.grid_of("model.layers.0.self_attn.k_proj") == Grid.registry["mxfp4"]()  # type: ignore[call-arg]
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("section", ["activations", "kv_cache"])
def test_scales_of_what_is_rounded_while_running_are_per_token_unless_said(section: str) -> None:
    grid = getattr(load_recipe({section: {"bits": 4}}), section).grid
    assert grid == IntegerGrid(bits=4, group_size=-1, scale="minmax")
    grid = getattr(load_recipe({section: {"bits": 4, "group_size": 32, "scale": "mse"}}), section).grid
    assert grid == IntegerGrid(bits=4, group_size=32, scale="mse")
