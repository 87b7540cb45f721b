"""The contract of steps around a solver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import gyroquant as gq
from gyroquant.grids import QuantizedWeight
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.rounding import InputStatistics, output_error
from gyroquant.rounding.base import PreparedWeight, When
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps.base import BlockStep, LayerStep
from gyroquant.testing.contract import Contract, require
from gyroquant.testing.grids import columns_for
from gyroquant.testing.models import amount, prose, tiny_model, tokenizer
from gyroquant.testing.solvers import grids, problem


def _named(step: LayerStep) -> str:
    return f"{step.key} {step}".strip()


STEP: Contract[LayerStep] = Contract("step", LayerStep, _named)


def _before(step: LayerStep) -> bool:
    return step.when < When.SOLVER


def _after(step: LayerStep) -> bool:
    return When.SOLVER < step.when < When.TUNE_BLOCK


def _on_layers(step: LayerStep) -> bool:
    return not isinstance(step, BlockStep)


def prepared(step: LayerStep, rows: int | None = None) -> Iterator[PreparedWeight]:
    """A problem for every kind of grid, as a step on layers gets it. After the solver, it is rounded to nearest."""
    for grid in grids():
        weight, statistics = problem(columns=columns_for(grid))
        grid = grid.with_tensor_scale(weight)
        seen = _with_input_error(statistics) if step.needs_original else statistics
        state = PreparedWeight("a weight", weight[:rows], seen if step.needs_statistics else None, None, grid)
        state = step.before_solver(state)
        yield state if _before(step) else replace(state, rounded=RoundToNearest().solve(state.matrix, grid))


def _with_input_error(statistics: InputStatistics) -> InputStatistics:
    """Statistics as if the inputs of the unrounded model were 10 % larger."""
    moments = statistics.second_moments
    return replace(statistics, input_error_cross=0.1 * moments, input_error_second_moments=0.01 * moments)


def _codes(weight: QuantizedWeight | None) -> QuantizedWeight:
    require(weight is not None, "it removes the codes of the solver: keep prepared.rounded")
    assert weight is not None
    return weight


@STEP.check()
def check_it_says_when_it_is_applied(step: LayerStep) -> None:
    """It has a key, and a `when` that fits its class: steps on blocks are `BlockStep`s."""
    require(bool(getattr(step, "key", "")), "it has no key, which recipes need: set key")
    require(isinstance(getattr(step, "when", None), When), "it does not state when it is applied: set when")
    require(step.when != When.SOLVER, "it replaces the solver: derive it from Solver")
    late = step.when >= When.TUNE_BLOCK
    require(
        late == isinstance(step, BlockStep), "steps from TUNE_BLOCK on must be BlockSteps, and other steps must not"
    )
    require(step.memory_bytes(64, 64) >= 0, "memory_bytes is negative")


@STEP.check()
def check_a_recipe_asks_for_it_by_its_key(step: LayerStep) -> None:
    """A recipe with its options under its key has this step, also after saving and reading."""
    options: Any = step.model_dump(mode="json") or True
    solver = {"solver": "rtn" if step.needs_original or step.conflicts(Gptq()) else "gptq"}
    recipe = gq.load_recipe({"weights": {"bits": 4, **solver, step.key: options}})
    require(step in recipe.weights.steps, f"a recipe with weights.{step.key} does not have this step")
    again = gq.load_recipe(recipe.to_dict())
    require(step in again.weights.steps, "the recipe loses it when it is saved and read")


@STEP.check(when=_before)
def check_it_leaves_a_matrix_to_round(step: LayerStep) -> None:
    """Before the solver, it returns a finite matrix of the same shape and does not change the given one."""
    for state in prepared(step):
        before = state.matrix.clone()
        after = step.apply(state)
        require(torch.equal(state.matrix, before), "it changes the matrix that it is given. Return a new one")
        require(after.matrix.shape == before.shape, f"the matrix has shape {tuple(after.matrix.shape)} afterwards")
        require(bool(after.matrix.isfinite().all()), "the matrix is not finite afterwards")
        require(after.rounded is None, "it rounds before the solver does. Set when = When.AFTER_SOLVER")


@STEP.check(when=_after)
def check_it_keeps_to_the_grid_and_makes_nothing_worse(step: LayerStep) -> None:
    """After the solver, it returns codes and scales that can be stored, and the output error does not grow."""
    for state in prepared(step):
        assert state.grid is not None
        weight, statistics = problem(columns=state.matrix.shape[1])
        old = _codes(state.rounded)
        before = old.dequantize()
        done = step.apply(state)
        new = _codes(done.rounded)
        require(torch.equal(old.dequantize(), before), "it changes the codes or scales that it is given")
        require(new.codes.shape == weight.shape, f"codes have shape {tuple(new.codes.shape)} afterwards")
        arrays, shape = new.pack(), (weight.shape[0], weight.shape[1])
        unpacked = QuantizedWeight(state.grid.with_stored_scale(arrays), *state.grid.unpack(arrays, shape))
        same = torch.equal(unpacked.dequantize(), new.dequantize())
        require(
            same, f"packing changes its result on the grid {state.grid.grid}: take scales that round_params returned"
        )
        error, limit = (output_error(weight, numbers, statistics) for numbers in (_numbers(done), before))
        worse = f"the output error on the grid {state.grid.grid} grows from {limit:.3g} to {error:.3g}"
        require(error <= limit * (1 + 1e-3), worse)


@STEP.check(when=_on_layers)
def check_it_is_deterministic(step: LayerStep) -> None:
    """The same input gives the same result."""
    for state in prepared(step):
        first, second = (_numbers(step.apply(state)) for _ in range(2))
        require(torch.equal(first, second), "the same input gives another result the second time")


@STEP.check(when=_on_layers)
def check_an_unreached_layer_does_no_harm(step: LayerStep) -> None:
    """The matrix stays finite with statistics of zero tokens."""
    for state in prepared(step):
        if state.statistics is None:
            continue
        empty = torch.zeros_like(state.statistics.second_moments)
        state = replace(state, statistics=InputStatistics(empty, 0))
        after = step.apply(replace(state, whole=None if state.whole is None else replace(state, whole=None)))
        require(bool(_numbers(after).isfinite().all()), "with statistics of zero tokens the result is not finite")


def _numbers(state: PreparedWeight) -> Tensor:
    """The matrix, or what its codes and low-rank factors stand for after the solver."""
    if state.rounded is None:
        return state.matrix
    products = [factors.product() for factors in state.low_rank]
    return state.decode() + torch.cat(products) if products else state.decode()


@STEP.check()
def check_a_model_is_rounded_with_it(step: LayerStep) -> None:
    """A tiny model is rounded with it, saved and opened. The same seed gives the same weights."""
    options: Any = step.model_dump(mode="json") or True
    solver = "gptq" if step.conflicts(RoundToNearest()) else "rtn"
    weights = {"bits": 3, "group_size": 32, "solver": solver, step.key: options}
    recipe = gq.load_recipe({"weights": weights, "calibration": {"dtype": "float32"}}, amount())
    arrays = []
    with TemporaryDirectory() as scratch:
        for name in ("first", "second"):
            out = Path(scratch) / name
            gq.quantize(tiny_model("llama_bias"), recipe, [prose(300)], out, tokenizer=tokenizer())
            store = open_model(out)
            assert isinstance(store, PackedStore)
            arrays.append(store.read(store.graph.block_params(0)))
    require(
        all(bool(tensor.isfinite().all()) for tensor in arrays[0].values()), "the model has weights that are not finite"
    )
    same = all(torch.equal(tensor, arrays[1][name]) for name, tensor in arrays[0].items())
    require(same, "the same recipe and seed give another model. Draw only from the seed of the block")


def check_step(step: LayerStep | type[LayerStep]) -> None:
    """Runs all checks of a step, or of every example of a class of steps.

    Raises AssertionError, which names the class, what is wrong and what to do.
    """
    STEP.run(step)
