"""The grid of runs: what is crossed with what, and what a run is named by."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import gyroquant as gq
from gyroquant.benchmark.execute import BASELINES
from gyroquant.benchmark.external_tools import ExternalTool, Size, ToolResult
from gyroquant.benchmark.runs import ComparisonSpec, Conditions, Run, plan_runs, with_key, with_keys
from gyroquant.errors import GyroquantError
from gyroquant.models.stores.source import open_model
from gyroquant.recipes.schema import load_recipe
from gyroquant.registry import Registry

CONDITIONS = Conditions("model", {"tokens": "text"}, {"test": {"window": 8, "windows": 2}}, "float32", {"torch": "2"})
GPTQ = "weights: {bits: 4, group_size: 64, symmetric: false, scale: mse, solver: gptq}\n"  # the preset
SMALL: dict[str, Any] = {"group_sizes": (16,), "nsamples": 4, "seqlen": 32}


def runs(*recipes: str, **changes: Any) -> list[Run]:
    graph = open_model(tiny_models.build("llama")).graph
    return plan_runs(ComparisonSpec(recipes, **{**SMALL, "bits": (2, 4), **changes}), "MODEL", graph, "the text.txt")


def test_recipes_sizes_and_seeds_are_crossed_and_what_neither_draws_nor_calibrates_has_one_seed() -> None:
    found = runs("rtn", "quarot", bits=(2, 3), group_sizes=(16, 32), seeds=(0, 1, 2))
    assert sum(run.name == "rtn" for run in found) == 4
    assert sum(run.name == "quarot" for run in found) == 12
    assert {(run.size.bits, run.size.group_size) for run in found} == {(2, 16), (2, 32), (3, 16), (3, 32)}
    assert {run.settings["seed"] for run in found if run.name == "quarot"} == {0, 1, 2}
    assert all(run.settings["weights"]["bits"] == run.size.bits for run in found)
    assert [run.seed for run in runs("gptq", bits=(2,), group_sizes=(48,), seeds=(0, 1))] == [0]  # refused: once


def test_a_seed_draws_rotations_and_everybodys_windows() -> None:
    found = runs("gptq", external_tools=("nncf:symmetric GPTQ", "llama.cpp"), bits=(4,), seeds=(0, 1))
    assert [run.settings["calibration"]["seed"] for run in found if run.kind == "recipe"] == [0, 1]
    seeds: dict[str, list[int]] = {}
    for run in found:
        seeds.setdefault(run.name, []).append(run.seed)
    assert seeds["nncf: symmetric GPTQ"] == seeds["llama.cpp: Q4_0 imatrix"] == [0, 1]
    assert seeds["llama.cpp: Q4_0"] == [0]
    data_free = runs("gptq", external_tools=("nncf:data-free",), bits=(4,), seeds=(0, 1))
    assert [run.seed for run in data_free if run.kind == "opponent"] == [0]


def test_variants_that_are_symmetric_anyway_are_there_once_where_all_are() -> None:
    names = {
        symmetric: [run.name for run in runs(external_tools=("nncf",), bits=(4,), symmetric=symmetric)]
        for symmetric in (True, False)
    }
    assert names[False].count("nncf: symmetric GPTQ") == 1
    assert names[True] == [name for name in names[False] if "symmetric" not in name]
    (asked,) = runs(external_tools=("nncf:symmetric GPTQ",), bits=(4,), symmetric=True)
    assert asked.name == "nncf: symmetric GPTQ"


@pytest.mark.parametrize(
    ("changes", "seeds"),
    [((), 1), (("kv_cache.bits=4", "kv_cache.center_keys=true"), 2), (("transform.R1.method=random_permutation",), 2)],
)
def test_what_draws_or_calibrates_beside_the_weights_has_every_seed(changes: tuple[str, ...], seeds: int) -> None:
    assert len(runs("rtn", bits=(4,), seeds=(0, 1), changes=changes, keep_activations=True)) == seeds


def test_the_baselines_rotate_nothing_and_have_the_stronger_gptq_too() -> None:
    found = {run.name: run for run in runs(*BASELINES, bits=(2,))}
    assert list(found) == ["rtn", "gptq", "gptq-act-order"]
    assert not any(run.rotated for run in found.values())
    solvers = [run.settings["weights"]["solver"] for run in found.values()]
    assert [solver.get("act_order") for solver in solvers] == [None, False, True]


def test_only_weights_are_rounded_unless_asked_and_rotations_then_learned_for_them() -> None:
    (one,) = runs("spinquant-no-had", bits=(2,))
    assert one.settings["activations"] is None
    assert one.settings["learn"]["round_weights"] is True
    (one,) = runs("spinquant-no-had", bits=(2,), keep_activations=True)
    assert one.settings["activations"]["bits"] == 8


def test_a_family_is_its_member_of_the_size_and_a_name_with_a_size_keeps_it() -> None:
    assert {run.name: run.size.bits for run in runs("gyro", bits=(2, 3))} == {"gyro-w2": 2, "gyro-w3": 3}
    (one,) = runs("gsr-w2g32")
    assert (one.size.bits, one.size.group_size) == (2, 32)
    (one,) = runs("gyro", bits=(2,), effort="light")
    assert one.name == "gyro-w2 (light)"
    with pytest.raises(GyroquantError, match="fixed size"):
        runs("gyro-w3")


def test_recipes_of_one_name_that_differ_are_refused_with_both_sources(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: gptq\n" + GPTQ.replace("mse", "minmax"))
    with pytest.raises(GyroquantError, match=r"recipes gptq and .*mine.yaml are both called 'gptq'.*another `name:`"):
        runs("gptq", str(mine))
    mine.write_text(mine.read_text().replace("name: gptq", "name: mine"))
    assert {run.name for run in runs("gptq", str(mine))} == {"gptq", "mine"}


def test_what_does_the_same_is_there_once(tmp_path: Path) -> None:
    found = with_keys(runs("gsr", "gsr-w2g16", bits=(2,), nsamples=128, seqlen=512), CONDITIONS)
    assert [run.name for run in found] == ["gsr"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"description: Mine.\n{GPTQ}")
    assert len(with_keys(runs("gptq", str(mine)), CONDITIONS)) == 2  # one at each number of bits
    assert len(with_keys(runs("gsr-w2g16", bits=(2,), group_sizes=(16, 32)), CONDITIONS)) == 1
    assert len(with_keys(runs("quarot", bits=(2,), seeds=(0, 1)), CONDITIONS)) == 2


def test_calibration_windows_are_everybodys_whatever_a_recipe_draws(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{GPTQ}calibration: {{seed: 7}}\n")
    first, other = with_keys(runs("gptq", bits=(2,)) + runs("gsr", str(mine), bits=(2,)), CONDITIONS)
    assert (first.name, other.name) == ("gptq", "gsr")
    assert first.settings["calibration"]["seed"] == 0
    assert shlex.split(first.command)[-2:] == ["--set", "calibration.seed=0"]
    for change in ("seed=3", "calibration.seed=3"):
        with pytest.raises(gq.InputError, match=f"--set {change}: all runs have the same seeds, use --seeds"):
            runs("gptq", bits=(2,), changes=(change,))


@pytest.mark.parametrize("change", ["weights.bits=4", "weights={bits: 4}"])
def test_changes_make_no_other_size(change: str) -> None:
    with pytest.raises(gq.InputError, match="--set gives the recipe gptq 4 bits: use --bits for that"):
        runs("gptq", bits=(2, 3), changes=(change,))


def test_a_command_makes_the_recipe_of_its_run() -> None:
    for one in runs("quarot", "gyro", bits=(2,), seeds=(0, 1), effort="light"):
        words = shlex.split(one.command)
        assert words[:4] == ["gyroquant", "quantize", "MODEL", "OUT"]
        options = list(zip(words[4::2], words[5::2], strict=True))
        assert ("--text", "the text.txt") in options
        given = dict(options)
        changes = [value for option, value in options if option == "--set"]
        assert load_recipe(given["--recipe"], changes, given.get("--effort")).to_dict() == one.settings


def test_a_run_tells_how_many_windows_it_calibrates_on() -> None:
    (gptq,) = runs("gptq", bits=(2,), nsamples=128)
    (gyro,) = runs("gyro", bits=(2,), nsamples=128)
    other = runs("gptq", external_tools=("auto-round:50 steps",), bits=(2,), nsamples=128)[-1]
    assert [run.to_dict()["nsamples"] for run in (gptq, gyro, other)] == [128, 64, 128]
    (odd,) = runs("perq", bits=(2,), changes=("weights.solver=many",))
    assert odd.refusal
    assert odd.to_dict()["nsamples"] is None


def test_what_does_not_fit_is_refused_with_the_reason_and_a_wrong_name_is_an_error() -> None:
    (one,) = runs("rtn", bits=(2,), group_sizes=(48,))
    assert "48" in str(one.refusal)
    with pytest.raises(GyroquantError, match="did you mean"):
        runs("gtpq")
    with pytest.raises(GyroquantError, match="none of the recipes has the effort light"):
        runs("gptq", effort="light")
    with pytest.raises(GyroquantError, match="there is no external tool 'nobody'"):
        runs("gptq", external_tools=("nobody",))


def test_how_windows_begin_is_told_by_the_tokens_and_the_command_not_by_the_name_of_a_result() -> None:
    (on,), (off,) = (runs("gptq", bits=(4,), add_bos=add_bos) for add_bos in (True, False))
    assert with_key(on, CONDITIONS).key == with_key(off, CONDITIONS).key
    assert "add_bos" not in on.command
    assert off.command.endswith("calibration.add_bos=false")
    with pytest.raises(gq.InputError, match="all runs have the same windows, use --no-bos"):
        ComparisonSpec(recipes=["gptq"], changes=["calibration.add_bos=false"])


def test_a_run_is_named_by_what_is_done_not_by_what_it_is_called() -> None:
    (one,) = runs("gptq", bits=(2,))
    key = with_key(one, CONDITIONS).key
    assert len(key) == 12
    renamed = replace(one, name="other", settings={**one.settings, "name": "other", "description": "?"})
    assert with_key(renamed, CONDITIONS).key == key
    for other in (replace(CONDITIONS, model="m"), replace(CONDITIONS, dtype="bfloat16"), replace(CONDITIONS, tests={})):
        assert with_key(one, other).key != key
    assert with_key(replace(one, settings={**one.settings, "seed": 1}), CONDITIONS).key != key
    assert with_key(replace(one, command="another"), CONDITIONS).key == key


def test_variants_of_a_program_are_runs_and_say_what_they_cannot(tools: Registry[type[ExternalTool]]) -> None:
    class Program(ExternalTool):
        home = "owner/name"
        requirements = ("program==1",)
        variants = {"fast": {"steps": 1}, "slow": {"steps": 9}}  # noqa: RUF012
        rotated = frozenset(("slow",))

        def problem(self, variant: str, size: Size) -> str:
            return "" if size.bits > 2 else "it has no 2 bits"

        def run(self, variant: str, task: Any, python: Any) -> ToolResult:
            raise AssertionError

    tools.add("program", Program)
    found = [run for run in runs("gptq", external_tools=("program",)) if run.kind == "opponent"]
    assert [(run.name, run.size.bits, run.refusal) for run in found] == [
        ("program: fast", 2, "it has no 2 bits"),
        ("program: slow", 2, "it has no 2 bits"),
        ("program: fast", 4, None),
        ("program: slow", 4, None),
    ]
    only = [run for run in runs("gptq", external_tools=("program:slow",), bits=(4,)) if run.kind == "opponent"]
    assert [(run.settings["steps"], run.rotated) for run in only] == [(9, True)]
    assert not found[0].rotated
    keys = {with_key(run, CONDITIONS).key for run in found}
    assert len(keys) == 4
    with pytest.raises(GyroquantError, match="has no variant 'medium'"):
        runs("gptq", external_tools=("program:medium",))


def test_a_type_with_a_size_of_its_own_is_one_run_of_that() -> None:
    found = [run for run in runs("rtn", external_tools=("llama.cpp",), group_sizes=(32, 64)) if run.kind == "opponent"]
    types = {run.label: run.size.group_size for run in with_keys(found, CONDITIONS)}
    assert len(types) == len(with_keys(found, CONDITIONS))
    assert types["llama.cpp: Q2_0 W2 g64"] == 64
    assert types["llama.cpp: Q2_K W2 g256"] == 256
    assert types["llama.cpp: Q4_0 W4 g32"] == 32
    with pytest.raises(GyroquantError, match=r"llama.cpp:Q2_K has no type of 3, 4 bits"):
        runs("rtn", external_tools=("llama.cpp:Q2_K",), bits=(3, 4))
    with pytest.raises(GyroquantError, match=r"llama.cpp has no type of 8 bits"):
        runs("rtn", external_tools=("llama.cpp",), bits=(8,))


def test_a_variant_that_is_always_symmetric_says_so() -> None:
    found = {run.name: run for run in runs("rtn", external_tools=("nncf",), bits=(2,)) if run.kind == "opponent"}
    assert found["nncf: symmetric GPTQ"].size == Size(2, 16, True)
    assert found["nncf: symmetric GPTQ"].refusal is None
    assert found["nncf: GPTQ"].size == Size(2, 16, False)
    assert found["nncf: GPTQ"].refusal


@pytest.mark.parametrize(("preset", "key"), [("gptq", "b29358e4990e"), ("spinquant", "79e418fceed6")])
def test_results_of_the_last_release_keep_their_keys(preset: str, key: str) -> None:
    """The keys are those that release 0.1 gave these runs, under the names of then."""
    run = Run("recipe", "x", Size(2, 64), 0, load_recipe(preset).to_dict())
    assert with_key(run, Conditions("m", {}, {}, "f", {})).key == key
