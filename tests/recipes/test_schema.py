"""Recipes: presets, files, changes, and refusals that name the nearest valid key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gyroquant.errors import RecipeError
from gyroquant.grids import Fp4Grid, Fp8Grid, Grid, IntegerGrid, Mxfp4Grid, Nvfp4Grid
from gyroquant.recipes.overrides import set_values
from gyroquant.recipes.presets import preset_names
from gyroquant.recipes.schema import load_recipe


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole_and_come_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert load_recipe(recipe.to_dict()) == recipe
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_every_preset_works_at_any_bits_and_group(name: str, bits: int) -> None:
    kind = type(load_recipe(name).weights.grid)
    try:
        kind(bits=bits, group_size=32)
    except ValidationError:
        pytest.skip(f"the grid of {name} does not have {bits} bits")
    grid = load_recipe(name, [f"weights.bits={bits}", "weights.group_size=32"]).weights.grid
    assert (grid.bits, grid.group_size) == (bits, 32)


def test_short_names_carry_bits_and_group() -> None:
    assert load_recipe("gsr-w2").weights.grid.bits == 2
    grid = load_recipe("gsr-w3g128").weights.grid
    assert (grid.bits, grid.group_size) == (3, 128)


def test_changes_reach_every_level() -> None:
    recipe = load_recipe(
        "gsr",
        [
            "weights.solver.act_order=true",
            "weights.symmetric=true",
            "transform.R1=null",
            "transform.R4.method=hadamard",
            "transform.R4.online=true",
            "calibration.nsamples=3",
            "weights.ignore=[lm_head, 're:down_proj$']",
        ],
    )
    assert recipe.weights.solver.act_order
    assert isinstance(recipe.weights.grid, IntegerGrid)
    assert recipe.weights.grid.symmetric
    assert list(recipe.transform) == ["R4"]
    assert recipe.transform["R4"][0].online is True
    assert recipe.calibration.nsamples == 3
    assert recipe.weights.ignore == ("lm_head", "re:down_proj$")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["weights.grid=mxfp4"], Mxfp4Grid()),
        (["weights.grid=mxfp4", "weights.scale_rounding=mse"], Mxfp4Grid(scale_rounding="mse")),
        (["weights.grid=nvfp4"], Nvfp4Grid(scale="mse")),
        (["weights.scale=minmax", "weights.grid=nvfp4"], Nvfp4Grid(scale="minmax")),
        (["weights.grid=fp4"], Fp4Grid(group_size=64)),
        (["weights.grid=fp4", "weights.group_size=-1"], Fp4Grid()),
        (["weights.grid=fp8"], Fp8Grid(group_size=64)),
        (["weights.grid=integer"], IntegerGrid(bits=4, group_size=64)),
    ],
)
def test_another_grid_keeps_what_it_can_have(changes: list[str], expected: Grid) -> None:
    recipe = load_recipe("gptq", changes)
    assert recipe.weights.grid == expected
    assert recipe.weights.solver.name == "gptq"
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(load_recipe("gptq").to_dict(), changes) == recipe


def test_the_way_back_from_another_grid() -> None:
    data = {"weights": {"grid": "mxfp4", "scale_rounding": "mse", "bits": 4, "group_size": 32}}
    assert load_recipe(data, ["weights.grid=integer"]).weights.grid == IntegerGrid(bits=4, group_size=32)
    data = {"weights": {"grid": "fp8", "bits": 8, "format": "e5m2"}}
    assert load_recipe(data, ["weights.grid=mxfp4"]).weights.grid == Mxfp4Grid()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq", ["weights.grid=mxfp4", "weights.bits=2"], "weights.bits: Input should be 4 for grid mxfp4 (given: 2)"),
        ("gptq", ["weights.bits=2", "weights.grid=mxfp4"], "weights.bits: Input should be 4 for grid mxfp4 (given: 2)"),
        ("gptq-w2", ["weights.grid=mxfp4"], "weights.bits: Input should be 4 for grid mxfp4 (given: 2)"),
        ("gptq-w4g64", ["weights.grid=nvfp4"], "weights.group_size: Input should be 16 for grid nvfp4 (given: 64)"),
        ("gptq", ["weights.grid=mxfp4", "weights.symmetric=true"], "weights of grid mxfp4 has no key 'symmetric'"),
        ("gptq", ["weights={bits: 2, grid: mxfp4}"], "Input should be 4 for grid mxfp4"),
        ("gptq", ["weights.grid=mxfp5"], "did you mean 'mxfp4'"),
        ("gptq", ["weights.grid=[mxfp4]"], "weights needs grid: one of additive, e8p, float_zero"),
        ("gptq", ["weights.clip=0.9"], "weights: scale: mse searches for the clipping itself"),
    ],
)
def test_what_is_asked_for_is_never_dropped(name: str, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, changes)
    assert message in str(caught.value)


def test_several_steps_at_one_site() -> None:
    steps = [{"method": "walsh", "block": 32}, "hadamard"]
    recipe = load_recipe({"transform": {"R1": steps}, "weights": {"bits": 4}})
    assert [step.method.method for step in recipe.transform["R1"]] == ["walsh", "hadamard"]
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights.bit=2", "weights has no key 'bit'; did you mean 'bits'"),
        ("weight.bits=2", "the recipe has no key 'weight'; did you mean 'weights'"),
        ("weights.bits=9", "weights.bits: Input should be less than or equal to 8"),
        ("weights.bits=two", "weights.bits: Input should be a valid integer"),
        ("weights.group_size=7", "weights.group_size: group_size is -1"),
        ("weights.grid=integral", "did you mean 'integer'"),
        ("weights.solver=gtpq", "did you mean 'gptq'"),
        ("weights.solver.act=true", "weights.solver has no key 'act'; did you mean 'act_order'"),
        ("weights.ignore=lm_head", "must be a list of module names"),
        ("transform.R9.method=hadamard", "transform has no key 'R9'"),
        ("transform.R1.method=hadamrd", "did you mean 'hadamard'"),
        ("transform.R1.online=maybe", "online is true, false"),
        ("transform.R1.block=-3", "block must be 'full'"),
        ("transform.R1.blok=3", "did you mean 'block'"),
        ("transform=5", "transform maps sites"),
        ("calibration.nsample=4", "did you mean 'nsamples'"),
        ("calibration.nsamples=0", "calibration.nsamples: Input should be greater than 0"),
        ("proof.treshold=1", "did you mean 'threshold'"),
        ("seed=abc", "seed: Input should be a valid integer"),
        ("weights.bits", "--set takes KEY=VALUE"),
        ("weights.bits=[", "not valid YAML"),
        ("seed.x=1", "seed: Input should be a valid integer"),
    ],
)
def test_nonsense_is_refused_with_the_nearest_key(change: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gsr", [change])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n- 2\n", "does not hold a mapping"),
        ("a: [", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "anchors or aliases"),
        ("# " + "x" * (1 << 20), "larger than any recipe"),
        ("transfrom: {}\n", "did you mean 'transform'"),
        ("\xff", "cannot be read"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("name", ["gsrr", "missing.yaml", "gsr-w9"])
def test_recipes_that_are_not_there(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no recipe is called|cannot be read|less than or equal to 8"):
        load_recipe(name)


def test_an_effort_changes_what_the_recipe_says_and_can_be_changed() -> None:
    plain, light = load_recipe("gyro-w2"), load_recipe("gyro-w2", effort="light")
    assert load_recipe("gyro-w2", effort="default") == plain
    assert light.name == "gyro-w2 (light)"
    assert (
        light.calibration.nsamples
        < plain.calibration.nsamples
        < load_recipe("gyro-w2", effort="best").calibration.nsamples
    )
    assert load_recipe("gyro-w2", ["calibration.nsamples=7"], "light").calibration.nsamples == 7


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("gyro-")])
@pytest.mark.parametrize("effort", ["light", "best"])
def test_our_recipes_have_efforts(name: str, effort: str) -> None:
    recipe = load_recipe(name, effort=effort)
    assert load_recipe(recipe.to_dict()) == recipe
    assert recipe != load_recipe(name)


@pytest.mark.parametrize(
    ("recipe", "effort", "message"),
    [
        ("gptq", "best", "gptq has no effort 'best'. It has default"),
        ("gyro-w2", "bst", "no effort 'bst'. It has default, light, best"),
        ({"efforts": ["light"]}, None, "efforts holds lists of changes by name"),
        ({"efforts": {"light": "finetune=null"}}, "light", "efforts holds lists of changes by name"),
        ({"efforts": {"light": ["wieghts.bits=2"]}}, "light", "did you mean 'weights'"),
    ],
)
def test_efforts_that_cannot_be(recipe: str | dict[str, Any], effort: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, effort=effort)


def test_changes_leave_their_input_alone() -> None:
    data = {"weights": {"bits": 4}}
    set_values(data, ["weights.bits=2"])
    assert data == {"weights": {"bits": 4}}
