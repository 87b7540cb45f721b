"""The grid of cells: what is crossed with what, and what a cell is named by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny

from gyroquant.comparison.cells import Cell, Conditions, Wanted, grid, named
from gyroquant.errors import GyroquantError
from gyroquant.models.source import open_model
from gyroquant.opponents import Opponent, Outcome, Size

CONDITIONS = Conditions("model", {"sha256": "text"}, {"test": {"sha256": "other"}}, "float32", {"torch": "2"})
SMALL: dict[str, Any] = {"group_sizes": (16,), "nsamples": 4, "seqlen": 32}


def cells(*recipes: str, **changes: Any) -> list[Cell]:
    graph = open_model(tiny.build("llama")).graph
    return grid(Wanted(recipes, **{**SMALL, "bits": (2, 4), **changes}), "MODEL", graph)


def test_recipes_sizes_and_seeds_are_crossed_and_what_draws_nothing_has_one_seed() -> None:
    found = cells("gptq", "quarot", bits=(2, 3), group_sizes=(16, 32), seeds=(0, 1, 2))
    assert sum(cell.name == "gptq" for cell in found) == 4
    assert sum(cell.name == "quarot" for cell in found) == 12
    assert {(cell.size.bits, cell.size.group_size) for cell in found} == {(2, 16), (2, 32), (3, 16), (3, 32)}
    assert {cell.settings["seed"] for cell in found if cell.name == "quarot"} == {0, 1, 2}
    assert all(cell.settings["weights"]["bits"] == cell.size.bits for cell in found)


def test_only_weights_are_rounded_unless_asked_and_rotations_then_learned_for_them() -> None:
    (one,) = cells("spinquant-no-had", bits=(2,))
    assert one.settings["activations"] is None
    assert one.settings["learn"]["round_weights"] is True
    (one,) = cells("spinquant-no-had", bits=(2,), keep_activations=True)
    assert one.settings["activations"]["bits"] == 8


def test_a_family_is_its_member_of_the_size_and_a_name_with_a_size_keeps_it() -> None:
    assert {cell.name: cell.size.bits for cell in cells("gyro", bits=(2, 3))} == {"gyro-w2": 2, "gyro-w3": 3}
    (one,) = cells("gsr-w2g32")
    assert (one.size.bits, one.size.group_size) == (2, 32)
    (one,) = cells("gyro", bits=(2,), effort="light")
    assert one.name == "gyro-w2 (light)"
    with pytest.raises(GyroquantError, match="has a size of its own"):
        cells("gyro-w3")


def test_what_does_not_fit_is_refused_with_the_reason_and_a_wrong_name_is_an_error() -> None:
    (one,) = cells("rtn", bits=(2,), group_sizes=(48,))
    assert "48" in str(one.refusal)
    with pytest.raises(GyroquantError, match="did you mean"):
        cells("gtpq")
    with pytest.raises(GyroquantError, match="none of the recipes has the effort light"):
        cells("gptq", effort="light")
    with pytest.raises(GyroquantError, match="there is no opponent 'nobody'"):
        cells("gptq", opponents=("nobody",))


def test_a_cell_is_named_by_what_is_done_not_by_what_it_is_called() -> None:
    (one,) = cells("gptq", bits=(2,))
    key = named(one, CONDITIONS).key
    assert len(key) == 12
    renamed = replace(one, name="other", settings={**one.settings, "name": "other", "description": "?"})
    assert named(renamed, CONDITIONS).key == key
    for other in (replace(CONDITIONS, model="m"), replace(CONDITIONS, dtype="bfloat16"), replace(CONDITIONS, tests={})):
        assert named(one, other).key != key
    assert named(replace(one, settings={**one.settings, "seed": 1}), CONDITIONS).key != key
    assert named(replace(one, command="another"), CONDITIONS).key == key


def test_variants_of_a_program_are_cells_and_say_what_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    class Program(Opponent):
        home = "owner/name"
        requirements = ("program==1",)
        variants = {"fast": {"steps": 1}, "slow": {"steps": 9}}  # noqa: RUF012

        def problem(self, variant: str, size: Size) -> str:
            return "" if size.bits > 2 else "it has no 2 bits"

        def run(self, variant: str, task: Any, python: Any) -> Outcome:
            raise AssertionError

    monkeypatch.setitem(Opponent.kinds, "program", Program)
    found = [cell for cell in cells("gptq", opponents=("program",)) if cell.kind == "opponent"]
    assert [(cell.name, cell.size.bits, cell.refusal) for cell in found] == [
        ("program: fast", 2, "it has no 2 bits"),
        ("program: slow", 2, "it has no 2 bits"),
        ("program: fast", 4, None),
        ("program: slow", 4, None),
    ]
    only = [cell for cell in cells("gptq", opponents=("program:slow",), bits=(4,)) if cell.kind == "opponent"]
    assert [cell.settings["steps"] for cell in only] == [9]
    keys = {named(cell, CONDITIONS).key for cell in found}
    assert len(keys) == 4
    with pytest.raises(GyroquantError, match="has no variant 'medium'"):
        cells("gptq", opponents=("program:medium",))
