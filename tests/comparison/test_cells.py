"""The grid of cells: what is crossed with what, and what a cell is named by."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import gyroquant as gq
from gyroquant.comparison.cells import Cell, Conditions, Wanted, all_named, grid, named
from gyroquant.comparison.run import BASELINES
from gyroquant.errors import GyroquantError
from gyroquant.models.source import open_model
from gyroquant.opponents import Opponent, Outcome, Size
from gyroquant.recipe import load_recipe

CONDITIONS = Conditions("model", {"tokens": "text"}, {"test": {"window": 8, "windows": 2}}, "float32", {"torch": "2"})
GPTQ = "weights: {bits: 4, group_size: 64, symmetric: false, scale: mse, solver: gptq}\n"  # the preset
SMALL: dict[str, Any] = {"group_sizes": (16,), "nsamples": 4, "seqlen": 32}


def cells(*recipes: str, **changes: Any) -> list[Cell]:
    graph = open_model(tiny.build("llama")).graph
    return grid(Wanted(recipes, **{**SMALL, "bits": (2, 4), **changes}), "MODEL", graph, "the text.txt")


def test_recipes_sizes_and_seeds_are_crossed_and_what_neither_draws_nor_calibrates_has_one_seed() -> None:
    found = cells("rtn", "quarot", bits=(2, 3), group_sizes=(16, 32), seeds=(0, 1, 2))
    assert sum(cell.name == "rtn" for cell in found) == 4
    assert sum(cell.name == "quarot" for cell in found) == 12
    assert {(cell.size.bits, cell.size.group_size) for cell in found} == {(2, 16), (2, 32), (3, 16), (3, 32)}
    assert {cell.settings["seed"] for cell in found if cell.name == "quarot"} == {0, 1, 2}
    assert all(cell.settings["weights"]["bits"] == cell.size.bits for cell in found)
    assert [cell.seed for cell in cells("gptq", bits=(2,), group_sizes=(48,), seeds=(0, 1))] == [0]  # refused: once


def test_a_seed_draws_rotations_and_everybodys_windows() -> None:
    found = cells("gptq", opponents=("nncf:symmetric GPTQ", "llama.cpp"), bits=(4,), seeds=(0, 1))
    assert [cell.settings["calibration"]["seed"] for cell in found if cell.kind == "recipe"] == [0, 1]
    seeds: dict[str, list[int]] = {}
    for cell in found:
        seeds.setdefault(cell.name, []).append(cell.seed)
    assert seeds["nncf: symmetric GPTQ"] == seeds["llama.cpp: Q4_0 imatrix"] == [0, 1]
    assert seeds["llama.cpp: Q4_0"] == [0]
    data_free = cells("gptq", opponents=("nncf:data-free",), bits=(4,), seeds=(0, 1))
    assert [cell.seed for cell in data_free if cell.kind == "opponent"] == [0]


def test_variants_that_are_symmetric_anyway_are_there_once_where_all_are() -> None:
    names = {
        symmetric: [cell.name for cell in cells(opponents=("nncf",), bits=(4,), symmetric=symmetric)]
        for symmetric in (True, False)
    }
    assert names[False].count("nncf: symmetric GPTQ") == 1
    assert names[True] == [name for name in names[False] if "symmetric" not in name]
    (asked,) = cells(opponents=("nncf:symmetric GPTQ",), bits=(4,), symmetric=True)
    assert asked.name == "nncf: symmetric GPTQ"


@pytest.mark.parametrize(
    ("changes", "seeds"),
    [((), 1), (("kv_cache.bits=4", "kv_cache.center_keys=true"), 2), (("transform.R1.method=random_permutation",), 2)],
)
def test_what_draws_or_calibrates_beside_the_weights_has_every_seed(changes: tuple[str, ...], seeds: int) -> None:
    assert len(cells("rtn", bits=(4,), seeds=(0, 1), changes=changes, keep_activations=True)) == seeds


def test_the_baselines_rotate_nothing_and_have_the_stronger_gptq_too() -> None:
    found = {cell.name: cell for cell in cells(*BASELINES, bits=(2,))}
    assert list(found) == ["rtn", "gptq", "gptq-act-order"]
    assert not any(cell.rotated for cell in found.values())
    solvers = [cell.settings["weights"]["solver"] for cell in found.values()]
    assert [solver.get("act_order") for solver in solvers] == [None, False, True]


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


def test_recipes_of_one_name_that_differ_are_refused_with_both_sources(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: gptq\n" + GPTQ.replace("mse", "minmax"))
    with pytest.raises(GyroquantError, match=r"recipes gptq and .*mine.yaml are both called 'gptq'.*another `name:`"):
        cells("gptq", str(mine))
    mine.write_text(mine.read_text().replace("name: gptq", "name: mine"))
    assert {cell.name for cell in cells("gptq", str(mine))} == {"gptq", "mine"}


def test_what_does_the_same_is_there_once(tmp_path: Path) -> None:
    found = all_named(cells("gsr", "gsr-w2g16", bits=(2,), nsamples=128, seqlen=512), CONDITIONS)
    assert [cell.name for cell in found] == ["gsr"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"description: Mine.\n{GPTQ}")
    assert len(all_named(cells("gptq", str(mine)), CONDITIONS)) == 2  # one at each number of bits
    assert len(all_named(cells("gsr-w2g16", bits=(2,), group_sizes=(16, 32)), CONDITIONS)) == 1
    assert len(all_named(cells("quarot", bits=(2,), seeds=(0, 1)), CONDITIONS)) == 2


def test_calibration_windows_are_everybodys_whatever_a_recipe_draws(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{GPTQ}calibration: {{seed: 7}}\n")
    first, other = all_named(cells("gptq", bits=(2,)) + cells("gsr", str(mine), bits=(2,)), CONDITIONS)
    assert (first.name, other.name) == ("gptq", "gsr")
    assert first.settings["calibration"]["seed"] == 0
    assert shlex.split(first.command)[-2:] == ["--set", "calibration.seed=0"]
    for change in ("seed=3", "calibration.seed=3"):
        with pytest.raises(gq.InputError, match=f"--set {change}: seeds are everybody's, and --seeds says how many"):
            cells("gptq", bits=(2,), changes=(change,))


@pytest.mark.parametrize("change", ["weights.bits=4", "weights={bits: 4}"])
def test_changes_make_no_other_size(change: str) -> None:
    with pytest.raises(gq.InputError, match="--set gives the recipe gptq 4 bits: ask for that by --bits"):
        cells("gptq", bits=(2, 3), changes=(change,))


def test_a_command_makes_the_recipe_of_its_cell() -> None:
    for one in cells("quarot", "gyro", bits=(2,), seeds=(0, 1), effort="light"):
        words = shlex.split(one.command)
        assert words[:4] == ["gyroquant", "quantize", "MODEL", "OUT"]
        options = list(zip(words[4::2], words[5::2], strict=True))
        assert ("--text", "the text.txt") in options
        given = dict(options)
        changes = [value for option, value in options if option == "--set"]
        assert load_recipe(given["--recipe"], changes, given.get("--effort")).to_dict() == one.settings


def test_a_cell_tells_how_many_windows_it_calibrates_on() -> None:
    (gptq,) = cells("gptq", bits=(2,), nsamples=128)
    (gyro,) = cells("gyro", bits=(2,), nsamples=128)
    other = cells("gptq", opponents=("auto-round:50 steps",), bits=(2,), nsamples=128)[-1]
    assert [cell.to_dict()["nsamples"] for cell in (gptq, gyro, other)] == [128, 64, 128]
    (odd,) = cells("perq", bits=(2,), changes=("weights.solver=many",))
    assert odd.refusal
    assert odd.to_dict()["nsamples"] is None


def test_what_does_not_fit_is_refused_with_the_reason_and_a_wrong_name_is_an_error() -> None:
    (one,) = cells("rtn", bits=(2,), group_sizes=(48,))
    assert "48" in str(one.refusal)
    with pytest.raises(GyroquantError, match="did you mean"):
        cells("gtpq")
    with pytest.raises(GyroquantError, match="none of the recipes has the effort light"):
        cells("gptq", effort="light")
    with pytest.raises(GyroquantError, match="there is no opponent 'nobody'"):
        cells("gptq", opponents=("nobody",))


def test_how_windows_begin_is_told_by_the_tokens_and_the_command_not_by_the_name_of_a_result() -> None:
    (on,), (off,) = (cells("gptq", bits=(4,), add_bos=add_bos) for add_bos in (True, False))
    assert named(on, CONDITIONS).key == named(off, CONDITIONS).key
    assert "add_bos" not in on.command
    assert off.command.endswith("calibration.add_bos=false")
    with pytest.raises(gq.InputError, match="--no-bos says how they begin"):
        Wanted(recipes=["gptq"], changes=["calibration.add_bos=false"])


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
        rotated = frozenset(("slow",))

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
    assert [(cell.settings["steps"], cell.rotated) for cell in only] == [(9, True)]
    assert not found[0].rotated
    keys = {named(cell, CONDITIONS).key for cell in found}
    assert len(keys) == 4
    with pytest.raises(GyroquantError, match="has no variant 'medium'"):
        cells("gptq", opponents=("program:medium",))


def test_a_type_with_a_size_of_its_own_is_one_cell_of_that() -> None:
    found = [cell for cell in cells("rtn", opponents=("llama.cpp",), group_sizes=(32, 64)) if cell.kind == "opponent"]
    types = {cell.label: cell.size.group_size for cell in all_named(found, CONDITIONS)}
    assert len(types) == len(all_named(found, CONDITIONS))
    assert types["llama.cpp: Q2_0 W2 g64"] == 64
    assert types["llama.cpp: Q2_K W2 g256"] == 256
    assert types["llama.cpp: Q4_0 W4 g32"] == 32
    with pytest.raises(GyroquantError, match=r"llama.cpp:Q2_K has sizes of its own, and none of 3, 4 bits"):
        cells("rtn", opponents=("llama.cpp:Q2_K",), bits=(3, 4))
    with pytest.raises(GyroquantError, match=r"llama.cpp has sizes of its own, and none of 8 bits"):
        cells("rtn", opponents=("llama.cpp",), bits=(8,))


def test_a_variant_that_is_always_symmetric_says_so() -> None:
    found = {cell.name: cell for cell in cells("rtn", opponents=("nncf",), bits=(2,)) if cell.kind == "opponent"}
    assert found["nncf: symmetric GPTQ"].size == Size(2, 16, True)
    assert found["nncf: symmetric GPTQ"].refusal is None
    assert found["nncf: GPTQ"].size == Size(2, 16, False)
    assert found["nncf: GPTQ"].refusal
