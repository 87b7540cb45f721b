"""What every recipe and external tool gets within a budget of bytes, and what is refused before any work."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fake_tools import fake

import gyroquant as gq
from gyroquant.benchmark.runs import ComparisonSpec, Run
from gyroquant.benchmark.sized_runs import SizedTool, plan_sized_runs, plan_sized_tools
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.job import planned
from gyroquant.pipeline.sizes import smallest_bytes

SMALL: dict[str, Any] = {"group_sizes": (16,), "nsamples": 4, "seqlen": 32}


def spec(*recipes: str, sizes: tuple[int | str, ...] = (40_000,), **changes: Any) -> ComparisonSpec:
    return ComparisonSpec(recipes, sizes=sizes, **{**SMALL, **changes})


def runs(*recipes: str, model: str = "llama_tied", **changes: Any) -> list[Run]:
    return plan_sized_runs(spec(*recipes, **changes), "MODEL", open_model(tiny_models.build(model)), "the text.txt")


def tools(*names: str, **changes: Any) -> list[SizedTool]:
    return plan_sized_tools(spec(external_tools=names, **changes), open_model(tiny_models.build("llama_tied")))


def test_sizes_take_the_place_of_bits_unless_both_are_asked_for() -> None:
    assert spec().widths == []
    assert ComparisonSpec(["rtn"]).widths == [2, 3, 4]
    both = spec(bits=(3,), sizes=("0.04MB", 40_000, "1.5 MiB"))
    assert (both.widths, both.budgets) == ([3], [40_000, 3 * 2**19])


def test_a_recipe_that_leaves_embeddings_in_16_bits_gets_bits_for_them_too() -> None:
    (run,) = runs("rtn")
    assert run.settings["weights"]["allocate"]["bytes"] == 40_000
    assert run.settings["weights"]["allocate"]["costs"] == "gradient"
    assert len(run.settings["weights"]["allocate"]["embeddings"]) >= 3
    assert (run.settings["embeddings"]["group_size"], run.settings["embeddings"]["symmetric"]) == (16, False)
    assert not run.settings.get("keep_ties")
    assert (run.label, run.max_bytes, run.rotated) == ("rtn 40.0 kB g16", 40_000, False)


def test_a_recipe_whose_maps_untie_the_head_keeps_it_tied() -> None:
    (run,) = runs("quarot")
    assert run.settings["keep_ties"] is True
    assert run.settings["embeddings"]["group_size"] == -1  # a scale a row does for rotated rows
    (run,) = runs("quarot", model="llama", sizes=(60_000,))
    assert "keep_ties" not in run.settings
    assert run.settings["head"]["bits"] == run.settings["embeddings"]["bits"]


def test_a_family_is_its_member_of_the_bits_that_a_budget_leaves() -> None:
    store = open_model(tiny_models.build("llama_tied", intermediate_size=128))
    sizes = tuple(int(store.weights * bits / 8) for bits in (3.5, 4.5))
    found = plan_sized_runs(spec("gyro", sizes=sizes), "MODEL", store, "the text.txt")
    assert [run.name for run in found] == ["gyro-w3", "gyro-w4"]
    assert [run.settings["weights"]["allocate"]["nsamples"] for run in found] == [16, 16]
    (run,) = runs("gyro-w3", sizes=(60_000,))  # a name with a size in it keeps it
    assert run.name == "gyro-w3"


@pytest.fixture
def four(tmp_path: Path) -> str:
    """A recipe whose grid has no bits to choose."""
    (tmp_path / "four.yaml").write_text("weights: {grid: mxfp4, solver: gptq}\ntransform: {R1: {method: hadamard}}\n")
    return str(tmp_path / "four.yaml")


def test_a_grid_without_bits_to_choose_gets_the_most_bits_of_embeddings_that_fit(four: str) -> None:
    store = open_model(tiny_models.build("llama_tied"))
    (large,), (small,) = runs(four, sizes=(60_000,)), runs(four, sizes=(42_000,))
    assert large.settings["weights"].get("allocate") is None
    assert large.settings["embeddings"]["bits"] == 8
    bits = small.settings["embeddings"]["bits"]
    assert bits < 8
    recipe = gq.load_recipe(dict(small.settings))
    assert smallest_bytes(planned(store, recipe))[0] <= 42_000
    more = gq.load_recipe(recipe, [f"embeddings.bits={bits + 1}", f"head.bits={bits + 1}"])
    assert smallest_bytes(planned(store, more))[0] > 42_000


def test_the_command_of_a_run_repeats_its_recipe() -> None:
    for name in ("gptq", "quarot", "gyro"):
        (run,) = runs(name)
        words = shlex.split(run.command)
        changes = [word for option, word in itertools.pairwise(words) if option == "--set"]
        assert gq.load_recipe(words[words.index("--recipe") + 1], changes).to_dict() == run.settings


def test_every_seed_runs_because_bits_are_chosen_on_the_text() -> None:
    assert [run.seed for run in runs("rtn", seeds=(0, 1))] == [0, 1]


def test_a_budget_that_one_recipe_cannot_keep_is_a_refusal_with_its_smallest_size(four: str) -> None:
    small, run = runs("rtn", four, sizes=(34_500,))
    assert small.refusal is None
    assert run.refusal is not None
    assert "it cannot take as little as 34.5 kB: its smallest size is 0.040 MB" in run.refusal


def test_a_budget_that_no_recipe_can_keep_is_refused_with_a_size_that_works() -> None:
    with pytest.raises(gq.InputError, match=r"no recipe takes as little as 20.0 kB. The smallest .* of rtn: give"):
        runs("rtn", sizes=(20_000,))
    with pytest.raises(gq.InputError) as refused:
        runs("rtn", sizes=(20_000,))
    words = str(refused.value).split("possible is ")[1].split(",")[0]
    assert runs("rtn", sizes=(words,))[0].refusal is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ("50XB",)}, r"--sizes: '50XB' is not a size: give a number and a unit, such as 60MB"),
        ({"sizes": (66,)}, r"--sizes: 66 is 66 bytes, which no model has: give a unit, such as 60MB"),
        ({"sizes": (), "bits": ()}, "--bits is empty"),
        ({"changes": ("weights.bits=3",)}, r"--set weights.bits=3: --sizes chooses the bits of every layer"),
        ({"changes": ("weights.allocate.nsamples=3",)}, "--sizes chooses the bits"),
        ({"effort": "light"}, "none of the recipes has the effort light"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(gq.InputError, match=message):
        runs("rtn", **changes)


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: rtn\nweights: {bits: 4, group_size: 64, solver: gptq}\n")
    with pytest.raises(gq.InputError, match="are both called 'rtn'"):
        runs("rtn", str(tmp_path / "mine.yaml"))


def test_a_tool_has_its_settings_of_all_bits_that_may_fit() -> None:
    store = open_model(tiny_models.build("llama_tied"))
    layers = sum(op.numel for op in store.graph.block_linears)
    plain = 2 * (store.weights - layers)
    budget = plain + layers * 3 // 8
    with fake(variants={"fast": {}, "slow": {}}):
        (tool,) = tools("fake", sizes=(budget,), group_sizes=(64,))
        assert {(run.name, run.size.bits) for run in tool.runs} == {
            (f"fake: {variant}", bits) for variant in ("fast", "slow") for bits in (2, 3)
        }
        assert all(run.candidate for run in tool.runs)
        assert tool.least["fake: fast W4 g64"] == plain + layers * 4 // 8
        (tool,) = tools("fake:slow", sizes=(plain,), group_sizes=(64,))
        assert tool.runs == ()
        (tool,) = tools("fake", sizes=(budget,), group_sizes=(16,))
        assert tool.problem == "fake needs groups that are multiples of 32, or whole rows (-1), not 16"
    with pytest.raises(gq.InputError, match="there is no external tool 'nobody'"):
        tools("nobody")


def test_settings_are_the_same_runs_for_every_budget() -> None:
    with fake():
        (one,), (other,) = tools("fake", group_sizes=(64,)), tools("fake", sizes=(40_000, 50_000), group_sizes=(64,))
    assert one.runs
    assert all(run in other.runs for run in one.runs)
