"""Steps around a solver: their order, what a recipe needs for them, and steps that only register themselves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.grids import IntegerGrid
from gyroquant.models.stores.source import open_model
from gyroquant.recipes.schema import load_recipe
from gyroquant.rounding import InputStatistics, Refine, SignRound, Target
from gyroquant.rounding.base import PreparedWeight, Solver, Warn, When
from gyroquant.rounding.layers import RoundingConfig
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps.base import BlockStep, LayerStep, RoundedBlock
from gyroquant.rounding.steps.correct_bias import CorrectBias
from gyroquant.testing import parametrize_with_checks


@pytest.fixture
def others() -> Iterator[dict[str, type[LayerStep]]]:
    """Two steps of somebody else: each is one class, and nothing else knows of them."""
    with LayerStep.registry.restored():

        class Damped(LayerStep):
            """Makes weights smaller before they are rounded."""

            key = "damped"
            when = When.BEFORE_SOLVER
            factor: float = 0.5

            def apply(self, prepared: PreparedWeight, warn: Warn = lambda text: None) -> PreparedWeight:
                warn("damped")
                return replace(prepared, matrix=self.factor * prepared.matrix)

        class Silenced(BlockStep):
            """Sets the last bias of every block to zero."""

            key = "silenced"
            when = When.CORRECT_BLOCK

            def apply_block(self, block: RoundedBlock) -> RoundedBlock:
                assert block.group.last_bias is not None
                zero = torch.zeros_like(block.plain[block.group.last_bias])
                return replace(block, plain={**block.plain, block.group.last_bias: zero})

        yield {"damped": Damped, "silenced": Silenced}


def test_steps_run_in_their_order() -> None:
    changes = ["weights.tune={}", "weights.refine={}", "weights.target={}", "weights.correct_bias=true"]
    weights = load_recipe("gptq", changes).weights
    assert [step.key for step in weights.steps] == ["target", "solver", "refine", "tune", "correct_bias"]
    assert [type(step) for step in weights.block_steps] == [SignRound, CorrectBias]
    assert [step.key for step in weights.layer_steps] == ["target", "solver", "refine"]
    assert [step.key for step in load_recipe("gptq", ["weights.correct_bias=false"]).weights.steps] == ["solver"]


@pytest.mark.parametrize(
    ("changes", "statistics", "original", "input_error", "second"),
    [
        ([], False, False, False, False),
        (["weights.solver=gptq"], True, False, False, False),
        (["weights.solver=qronos"], True, True, True, False),
        (["weights.target={}"], True, True, True, True),
        (["weights.refine={}"], True, False, False, False),
        (["weights.tune={}"], True, True, False, False),
        (["weights.correct_bias=true"], True, True, False, False),
    ],
    ids=str,
)
def test_needs_of_a_recipe_are_those_of_its_steps(
    changes: list[str], statistics: bool, original: bool, input_error: bool, second: bool
) -> None:
    weights = load_recipe("rtn", changes).weights
    assert weights.needs_statistics == statistics
    assert weights.needs_original == original
    assert weights.needs_input_error == weights.observes_in_turn == input_error
    assert weights.needs_input_error_second_moments == second


def test_a_new_step_needs_no_edit(
    others: dict[str, type[LayerStep]], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = ["weights.bits=8", "weights.damped={factor: 0.25}", "weights.silenced=true"]
    recipe = load_recipe("gptq", changes)
    assert load_recipe(recipe.to_dict()) == recipe
    assert recipe.weights.needs_original
    manifest = run(folders["gpt2"], tmp_path / "out", "gptq", corpus, *changes)
    assert manifest["recipe"]["weights"]["damped"] == {"factor": 0.25}  # type: ignore[index]
    assert any("damped" in text for text in manifest["warnings"])  # type: ignore[attr-defined]
    original, rounded = open_model(folders["gpt2"]), open_model(tmp_path / "out")
    for op in original.graph.block_linears:
        before, after = (store.read([op.weight])[op.weight].float() for store in (original, rounded))
        assert torch.allclose(after, 0.25 * before, atol=0.01 * float(before.abs().max()))
    for group in rounded.graph.blocks:
        assert group.last_bias is not None
        assert not rounded.read([group.last_bias])[group.last_bias].any()


def test_what_a_recipe_says_of_it_is_checked(others: dict[str, type[LayerStep]]) -> None:
    with pytest.raises(RecipeError, match="did you mean 'factor'"):
        load_recipe("gptq", ["weights.damped={factr: 1}"])
    with pytest.raises(RecipeError, match=r"weights\.damped holds settings such as factor"):
        load_recipe("gptq", ["weights.damped=3"])
    with pytest.raises(RecipeError, match=r"(?s)weights.*did you mean 'damped'"):
        load_recipe("gptq", ["weights.dampd={}"])
    with pytest.raises(RecipeError, match="silenced has no options: it is true or false"):
        load_recipe("gptq", ["weights.silenced={loud: true}"])


def test_without_the_package_of_a_step_its_key_is_unknown() -> None:
    with pytest.raises(RecipeError, match="weights"):
        load_recipe("gptq", ["weights.silenced=true"])


def test_without_statistics_steps_that_need_them_are_left_out() -> None:
    weight, said = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), list[str]()
    grid = IntegerGrid(bits=3, group_size=16)
    nearest = RoundToNearest().solve(weight, grid)
    for steps, warned in (
        ([RoundToNearest()], 0),
        ([Target(), RoundToNearest()], 0),
        ([RoundToNearest(), Refine()], 1),
    ):
        said.clear()
        config = RoundingConfig(steps, grid, None, said.append)
        found = config.solve(config.prepare("expert", weight, None), grid)
        assert torch.equal(found.codes, nearest.codes)
        assert len(said) == warned


def test_steps_are_applied_to_what_the_ones_before_made() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=generator), torch.randn(200, 32, generator=generator)
    statistics, grid = InputStatistics(x.T @ x, 200), IntegerGrid(bits=2, group_size=16)
    config = RoundingConfig([RoundToNearest(), Refine()], grid, None, print)
    found = config.solve(config.prepare("layer", weight, statistics), grid)
    by_hand = Refine().run(weight, RoundToNearest().solve(weight, grid), statistics)
    assert torch.equal(found.codes, by_hand.codes)
    assert not torch.equal(found.codes, RoundToNearest().solve(weight, grid).codes)


@pytest.mark.parametrize("key", LayerStep.registry)
def test_every_step_is_listed_with_what_it_needs(key: str) -> None:
    kind = LayerStep.registry[key]
    assert kind.key == key
    assert isinstance(kind.when, When)
    assert issubclass(kind, BlockStep) == kind.needs_block == (kind.when >= When.TUNE_BLOCK)
    assert kind.needs_statistics or kind.needs_block
    assert key in gq.load_recipe("gptq").weights.model_dump()


def test_a_solver_that_takes_models_declares_it() -> None:
    solver = Solver.registry["auto_round"](name="auto_round")
    assert solver.needs_model
    assert solver.random
    assert solver.for_layers() == RoundToNearest()
    assert RoundToNearest().for_layers() == RoundToNearest()
    with pytest.raises(TypeError, match="layer by layer"):
        RoundToNearest().quantize_model(None, {}, torch.zeros(1, 1), None, 0)


@parametrize_with_checks(LayerStep.registry)
def test_every_step_keeps_its_contract(instance: LayerStep, check: Any) -> None:
    check(instance)
