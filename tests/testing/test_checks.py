"""The public checks find what is wrong, and say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gyroquant import testing
from gyroquant.calibration.observers import MeanAbs
from gyroquant.grids import Grid, GroupParams, IntegerGrid, QuantizedWeight, TrellisGrid
from gyroquant.maps import Hadamard, Identity, Map
from gyroquant.methods import Context, Method
from gyroquant.models.graph.sites import Site
from gyroquant.models.graph.spec import ARCHITECTURES, Linear
from gyroquant.registry import restored
from gyroquant.rounding.base import PreparedWeight, Solver, When
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps.base import LayerStep
from gyroquant.testing.contract import pairs
from gyroquant.testing.parametrize import contract_of


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with restored():
        yield


def fails(check: Callable[[Any], None], thing: Any, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check(thing)


def test_a_class_without_examples_is_told_so() -> None:
    class Silent(Method):
        method: Literal["silent"] = "silent"

        def choose(self, site: Site, context: Context) -> Map:
            return Identity(site.n)

    fails(testing.check_method, Silent, "Silent gives no examples. Define the class method")
    testing.check_method(Silent(), fold=False)


def test_what_is_of_another_kind_is_told_so() -> None:
    fails(testing.check_grid, Identity(4), "is not a grid: derive it from Grid")


def test_methods_for_some_sites_must_refuse_others() -> None:
    class Everywhere(Method):
        method: Literal["everywhere"] = "everywhere"
        sites = ("R1",)

        def choose(self, site: Site, context: Context) -> Map:
            return Identity(site.n)

    fails(testing.check_method, Everywhere(), "Everywhere .*it is for R1 and takes .*Refuse it in check")


def test_maps_must_be_what_structure_says() -> None:
    class Turned(Method):
        method: Literal["turned"] = "turned"
        structure = "permutation"

        def choose(self, site: Site, context: Context) -> Map:
            return Hadamard(site.n)

    fails(testing.check_method, Turned(), "its map is not permutation")


class Careless(IntegerGrid):
    """A grid that says something else than it does."""

    grid: Literal["careless"] = "careless"  # type: ignore[assignment]


Grid.registry.discard("careless")  # other tests look at all grids


def careless(**members: Any) -> IntegerGrid:
    return type("Careless", (Careless,), members | {"__module__": __name__})(bits=3, group_size=64)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"group_bits": property(lambda self: 8)}, r"pack stores \d+ bits, but bits, group_bits and tensor_bits add"),
        ({"scale_step": 1e-6}, "half of scale_step"),
        ({"encode": lambda self, w, p: IntegerGrid.encode(self, w * 0.8, p)}, "encode"),
        ({"step_below": lambda self, numbers: 2 * torch.ones_like(numbers)}, "step_below is not the distance"),
        ({"fits": ("minmax", "magic")}, "its_fits_are_settings raised InputError: a grid careless cannot have scale"),
    ],
)
def test_grids_are_held_to_what_they_say(members: dict[str, Any], says: str) -> None:
    fails(testing.check_grid, careless(**members), f"Careless .*{says}")


def _by_the_last_row(self: TrellisGrid, weights: Tensor, params: GroupParams) -> Tensor:
    far = len(weights) > 2 * self.tile_rows
    return TrellisGrid.encode(self, weights + weights[-1:] if far else weights, params)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"encode": _by_the_last_row}, "the codes of 16 rows depend on other rows"),
        (
            {"quick": property(lambda self: self.model_copy(update={"bits": 1, "sequence": 32}))},
            r"quick takes \d+ bits",
        ),
        ({"encode": lambda self, w, p: TrellisGrid.encode(self, -w, p)}, "encode"),
        ({"fake": lambda self, x: x}, "fake accepts it"),
    ],
)
def test_grids_that_code_rows_together_are_held_to_it(members: dict[str, Any], says: str) -> None:
    class Woven(TrellisGrid):
        grid: Literal["woven"] = "woven"  # type: ignore[assignment]

    Grid.registry.discard("woven")
    kind = type("Woven", (Woven,), members | {"__module__": __name__})
    Grid.registry.discard("woven")
    fails(testing.check_grid, kind(bits=2, state_bits=8, sequence=16), f"Woven .*{says}")


def test_a_grid_that_holds_no_zero_must_say_so() -> None:
    class Off(IntegerGrid):
        grid: Literal["off"] = "off"  # type: ignore[assignment]
        holds_zero = property(lambda self: True)  # type: ignore[assignment]

    fails(testing.check_grid, Off(bits=2, group_size=64, symmetric=True, midrise=True), "set holds_zero")


def test_maps_are_held_to_what_they_say() -> None:
    @dataclass(frozen=True, eq=False)
    class Doubling(Map):
        n: int
        orthogonal = True
        cost = 0

        def _apply(self, x: Tensor) -> Tensor:
            return 2 * x

        def inverse(self) -> Map:
            return self

        def transpose(self) -> Map:
            return self

    fails(testing.check_map, Doubling(8), r"Doubling \(doubling orthogonal, order 8\): inverse\(\) is not the inverse")


def test_solvers_are_held_to_what_they_say() -> None:
    class Idle(Solver):
        name: Literal["idle"] = "idle"
        needs_statistics = True

        def solve(self, weight: Tensor, grid: Grid, statistics: Any, warn: Any = None) -> QuantizedWeight:
            solved = RoundToNearest().solve(weight, grid)
            return replace(solved, params=GroupParams(solved.params.scale * 1.0001, solved.params.zero))

    fails(testing.check_solver, Idle(), "packing changes the result on the grid .*take scales that fit or round_params")


def test_a_solver_that_needs_statistics_must_use_them() -> None:
    class Nearest(Solver):
        name: Literal["nearest"] = "nearest"
        needs_statistics = True

        def solve(self, weight: Tensor, grid: Grid, statistics: Any, warn: Any = None) -> QuantizedWeight:
            return RoundToNearest().solve(weight, grid)

    fails(testing.check_solver, Nearest(), "its output error on the grid .* rounding to nearest has")


def test_steps_must_not_make_anything_worse() -> None:
    class Spoil(LayerStep):
        key = "spoil"
        when = When.AFTER_SOLVER

        def apply(self, prepared: PreparedWeight, warn: Any = None) -> PreparedWeight:
            assert prepared.rounded is not None
            return replace(prepared, rounded=replace(prepared.rounded, codes=prepared.rounded.codes // 2))

    fails(testing.check_step, Spoil(), "the output error on the grid .* grows")


def test_observers_are_held_to_their_size() -> None:
    class Small(MeanAbs):
        @staticmethod
        def size_in_bytes(n: int) -> int:
            return n

    fails(testing.check_observer, Small, "it holds 2048 bytes .* but size_in_bytes says 256")


def test_an_architecture_that_forgets_a_reader_is_found() -> None:
    llama = ARCHITECTURES["llama"]
    wrong = tuple(
        replace(part, reads="mlp_in") if isinstance(part, Linear) and part.name == "self_attn.q_proj" else part
        for part in llama.block
    )
    register_again = replace(llama, block=wrong, examples={"llama": llama.examples["llama"]})
    with restored():
        ARCHITECTURES.discard("llama")
        ARCHITECTURES.add("llama", register_again)
        fails(
            testing.check_architecture,
            register_again,
            r"\(llama\): a map at R1 changes the model: .* another basis than",
        )


def test_ids_of_tests_say_class_and_check() -> None:
    names = [name for name, _, _ in pairs(contract_of(Identity), [Identity])]
    assert "Identity (identity orthogonal diagonal, order 24)-inverse_and_transpose" in names


def test_what_has_no_contract_is_refused() -> None:
    with pytest.raises(TypeError, match=r"3 has no contract\. Kinds with a contract: method, solver, step"):
        testing.parametrize_with_checks(3)
