"""The page of a comparison and its Markdown: whole, harmless, and with the same numbers."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparison_example import EVIL, example, hostile, of_last_release

from gyroquant.benchmark import rows as rows
from gyroquant.benchmark.markdown import markdown
from gyroquant.benchmark.page import plots, svg, write_page
from gyroquant.errors import InputError
from gyroquant.recipes import presets
from gyroquant.recipes.schema import load_recipe

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")


class Reader(HTMLParser):
    """What a page loads, its ids, its headings, the texts of its tables' runs, and the elements left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.headings: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.runs: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [f"{tag} {found[key]}" for key in ("src", "href", "data", "action", "srcset") if found.get(key)]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "script":
            self.scripts.append(found)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(tag)
        if tag == "td":
            self.runs.append("")
        if found.get("role") == "img":
            self.labels.append(found.get("aria-label") or "")
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open and self.runs:
            self.runs[-1] += data


def made(comparison: dict[str, Any], folder: Path) -> str:
    write_page(comparison, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(example(), tmp_path_factory.mktemp("page"))


def test_it_loads_nothing_and_forbids_loading(page: str) -> None:
    found = Reader(page)
    assert all(one.startswith(("a #", "link data:")) for one in found.loads), found.loads
    assert not re.search(r"@import|url\(", page[: page.index("</style>")])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "http" not in policy[1]


def test_it_is_well_formed(page: str) -> None:
    found = Reader(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert found.headings[0] == "h1"
    assert found.headings.count("h1") == 1
    assert all(int(b[1]) - int(a[1]) <= 1 for a, b in itertools.pairwise(found.headings))
    assert all(f'href="#{one}"' not in page or one in found.ids for one in found.ids)


def test_the_verdict_comes_first_and_every_section_is_there(page: str) -> None:
    names = ["verdict", "tradeoff", "results", "layers", "outliers", "mass", "seeds", "repeat"]
    assert [one for one in Reader(page).ids if one in names] == names
    assert 'id="absent"' not in page
    assert set(data_of(page)["plots"]) == {"pareto", "pareto_bits", "layers", "outliers", "mass", "seeds"}
    assert len(Reader(page).labels) == 6
    assert all(Reader(page).labels)


def test_every_run_has_a_row_for_each_text_and_a_reason_where_there_is_no_number(page: str) -> None:
    runs = example()["cells"]
    assert page.count("<tr data-bits=") == 2 * len(runs)
    for run in runs:
        assert run["reason"] is None or run["reason"] in page


def test_the_table_says_what_was_measured(page: str) -> None:
    run = next(one for one in example()["cells"] if one["status"] == "done")
    said = [" ".join(text.split()) for text in Reader(page).runs]
    for test in run["tests"].values():
        assert any(text.startswith(rows.perplexity(test["perplexity"])) for text in said)
    assert f'data-value="{run["true_bits"]!r}"' in page


def test_markdown_says_the_same_numbers(page: str) -> None:
    comparison = example()
    text = markdown(comparison)
    printed = {" ".join(one.split()) for one in Reader(page).runs}
    shown = rows.columns(comparison)
    for test in rows.tests(comparison):
        for row in rows.rows(comparison, test):
            for column in shown:
                assert any(one.startswith(column.text(row)) for one in printed)
            line = next(
                one for one in text[text.index(f"{row.run['bits']} bits, {test}") :].splitlines() if row.name in one
            )
            assert line.count(" | ") == len(shown) - 1
    for budget in comparison["verdict"]:
        assert budget["text"] in text
        assert budget["text"].replace("'", "&#39;") in page
        assert budget["command"] is None or (budget["command"] in text and budget["command"] in page)


def test_text_is_text(tmp_path: Path) -> None:
    page = made(hostile(), tmp_path)
    found = Reader(page)
    assert found.open == []
    assert len(found.scripts) == 4
    assert "<script>alert" not in page
    assert "{{ 7*7 }}" in page
    assert any(one["name"] == EVIL.replace("\u2028", " ") for one in data_of(page)["plots"]["pareto"]["data"]["values"])
    assert "<script>" not in re.sub(r"(`{3,})sh\n.*?\n\1", "", markdown(hostile()), flags=re.DOTALL).replace("\\<", "")


def without_layers(comparison: dict[str, Any]) -> None:
    for run in comparison["cells"]:
        run["layers"] = []


def without_outliers(comparison: dict[str, Any]) -> None:
    comparison["original"]["outliers"] = []
    for run in comparison["cells"]:
        run["outliers"] = []


def without_mass(comparison: dict[str, Any]) -> None:
    for one in comparison["original"]["outliers"]:
        one["mass"] = {}
    for run in comparison["cells"]:
        for one in run.get("outliers") or ():
            one["mass"] = {}


def without_seeds(comparison: dict[str, Any]) -> None:
    comparison["cells"] = [run for run in comparison["cells"] if run["seed"] == 0]


def without_original(comparison: dict[str, Any]) -> None:
    comparison["original"]["tests"] = {}
    for budget in comparison["verdict"]:
        budget["rows"] = []


@pytest.mark.parametrize(
    ("change", "plot"),
    [
        (without_layers, "layers"),
        (without_outliers, "outliers"),
        (without_mass, "mass"),
        (without_seeds, "seeds"),
        (without_original, "pareto"),
    ],
)
def test_a_section_without_data_is_left_out_and_said_to_be(
    change: Callable[[dict[str, Any]], None], plot: str, tmp_path: Path
) -> None:
    comparison = example()
    change(comparison)
    page = made(comparison, tmp_path)
    assert plot not in data_of(page)["plots"]
    assert f'data-plot="{plot}" role' not in page
    assert 'id="absent"' in page
    assert markdown(comparison)


def test_of_many_recipes_the_same_few_are_drawn_in_all_budgets() -> None:
    comparison = example()
    rotated = [run for run in comparison["cells"] if run["name"] in ("quarot", "gsr", "perq") and run["seed"] == 0]
    for n in range(6):
        for run in rotated:
            name = f"{run['name']} {'abcdef'[n if run['bits'] == 2 else 5 - n]}"
            comparison["cells"].append({**run, "name": name, "label": f"{name} W{run['bits']}", "key": f"{n}{name}"})
    drawn = plots(comparison)["outliers"]["data"]["values"]
    names = [{one["recipe"] for one in drawn if one["bits"] == bits} for bits in (2, 3, 4)]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 7


def test_what_is_far_larger_than_its_name_is_told_and_not_drawn(tmp_path: Path) -> None:
    comparison = example()
    (large,) = (run for run in comparison["cells"] if run["label"] == "perq W2 g64")
    large["true_bits"] = 7.885
    large["weight_bytes"] = {**large["weight_bytes"], "total": 987_600_000}
    page = made(comparison, tmp_path)
    drawn = data_of(page)["plots"]
    for plot, words, limit in (("pareto", "987.6 MB", 300), ("pareto_bits", "7.885 bits", 5)):
        assert f"Too large to be drawn: perq W2 g64 ({words})." in page
        points = drawn[plot]["data"]["values"]
        assert "perq W2 g64" not in {one["name"] for one in points}
        assert max(one["x"] for one in points) < limit


def test_the_front_is_over_bytes_and_in_the_second_view_over_bits(page: str) -> None:
    runs = {run["label"]: run for run in example()["cells"] if run["seed"] == 0 and run["status"] == "done"}
    drawn = data_of(page)["plots"]
    for plot, size in (
        ("pareto", lambda run: run["weight_bytes"]["total"] / 1e6),
        ("pareto_bits", lambda run: run["true_bits"]),
    ):
        points = drawn[plot]["data"]["values"]
        assert {one["name"] for one in points} == set(runs)
        assert all(one["x"] == pytest.approx(size(runs[one["name"]]), rel=1e-5) for one in points)
    assert 'data-view="pareto">' in page
    assert 'data-view="pareto_bits" hidden>' in page
    assert re.search(r'<option value="pareto" selected>bytes of the file</option>', page)


def test_rows_without_bytes_are_in_the_view_of_bits(tmp_path: Path) -> None:
    comparison = of_last_release()
    drawn = data_of(made(comparison, tmp_path))["plots"]["pareto"]
    assert '"files, MB"' in json.dumps(drawn["layer"])
    by_files = drawn["data"]["values"]
    sizes = {run["label"]: run["bytes"] / 1e6 for run in comparison["cells"] if run["status"] == "done"}
    assert all(one["x"] == pytest.approx(sizes[one["name"]], rel=1e-5) for one in by_files)
    for run in comparison["cells"]:
        run.pop("bytes", None)
    page = made(comparison, tmp_path)
    assert set(data_of(page)["plots"]) >= {"pareto_bits"}
    assert "pareto" not in data_of(page)["plots"]
    assert 'id="pareto" data-plot="pareto_bits"' in page
    assert "On the front, from the smallest" in page
    assert markdown(comparison)


def test_the_table_has_bytes_and_bits_of_everything_and_of_the_layers(page: str) -> None:
    (run,) = (one for one in example()["cells"] if one["label"] == "gsr W4 g64" and one["seed"] == 0)
    said = [" ".join(text.split()) for text in Reader(page).runs]
    total, layers = (run["weight_bytes"][part] / 1e6 for part in ("total", "layers"))
    assert f"{total:.1f} MB{layers:.1f} MB in layers" in said
    for heading in ("Size", "Bits, all", "Bits, layers"):
        assert f">{heading}</button>" in page
    assert f"{run['whole_model_bits']:.3f}" in said


def test_boxes_are_drawn_where_there_are_seeds_enough() -> None:
    comparison = example()
    assert "bar" in json.dumps(plots(comparison)["seeds"]["layer"])
    comparison["cells"] = [run for run in comparison["cells"] if run["seed"] < 4]
    assert "bar" not in json.dumps(plots(comparison)["seeds"]["layer"])


def nothing_done(comparison: dict[str, Any]) -> None:
    for run in comparison["cells"]:
        run |= {"status": "failed", "reason": "out of memory"}
    comparison["verdict"] = []


def nothing_asked(comparison: dict[str, Any]) -> None:
    comparison |= {"cells": [], "verdict": [], "notes": [], "versions": {}}
    comparison["original"] = {"tests": {}, "outliers": []}
    comparison["texts"]["tests"] = {}


def no_external_tools_no_kl(comparison: dict[str, Any]) -> None:
    comparison["cells"] = [run for run in comparison["cells"] if run["kind"] == "recipe"]
    for run in comparison["cells"]:
        for one in run["tests"].values():
            one |= {"kl": None, "kl_interval": None, "top1_agreement": None, "top1_interval": None}


def lost_models(comparison: dict[str, Any]) -> None:
    for run in comparison["cells"][:5]:
        for one in run["tests"].values():
            one |= {"perplexity": math.inf, "perplexity_interval": [math.inf, math.nan], "kl": math.nan}
        run["layers"] = [layer | {"output_error": math.nan, "decibels": None} for layer in run["layers"]]
        run["proof_error"] = math.nan


def only_external_tools(comparison: dict[str, Any]) -> None:
    comparison["cells"] = [run for run in comparison["cells"] if run["kind"] == "opponent"]


@pytest.mark.parametrize(
    "change",
    [nothing_done, nothing_asked, no_external_tools_no_kl, lost_models, only_external_tools],
    ids=lambda one: one.__name__,
)
def test_whatever_is_missing_there_is_a_page(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    comparison = example()
    change(comparison)
    page = made(comparison, tmp_path)
    assert Reader(page).open == []
    data_of(page)
    for spec in plots(comparison).values():
        assert "<svg" in svg(spec)
    assert markdown(comparison).startswith("# SmolLM2")
    if change is no_external_tools_no_kl:
        assert not {"KL", "Top-1"} & {column.heading for column in rows.columns(comparison)}


def test_gaps_of_zero_and_below_are_drawn_where_they_are() -> None:
    comparison = example()
    for budget in comparison["verdict"]:
        for row in budget["rows"]:
            row["gap"] -= 0.03
            row["gap_interval"] = [end - 0.03 for end in row["gap_interval"]]
    spec = plots(comparison)["pareto"]
    assert min(point["y"] for point in spec["data"]["values"]) < 0
    assert spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "symlog"
    assert "<svg" in svg(spec)


def test_the_front_falls_and_its_steps_are_those_of_the_verdict() -> None:
    comparison = example()
    spec = plots(comparison)["pareto"]
    steps = spec["layer"][0]["data"]["values"]
    along = [one for one in steps if one["test"] == "wikitext-2" and one["scope"] == "all"]
    assert along == sorted(along, key=lambda one: one["x"])
    assert all(a["y"] > b["y"] for a, b in itertools.pairwise(along))
    budget = comparison["verdict"][0]
    assert len([one for one in steps if one["test"] == "wikitext-2" and one["scope"] == "2"]) == len(budget["front"])


def test_plots_are_drawn_without_a_browser_in_both_themes() -> None:
    for name, spec in plots(example()).items():
        light, dark = svg(spec), svg(spec, theme="dark")
        assert light.count("<path") > 3, name
        assert light != dark


def test_a_comparison_is_not_changed_by_reading_it(tmp_path: Path) -> None:
    comparison = example()
    before = copy.deepcopy(comparison)
    made(comparison, tmp_path)
    markdown(comparison)
    assert comparison == before


def test_other_formats_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format 2"):
        write_page(example() | {"format": 2}, tmp_path / "page.html")
    with pytest.raises(InputError, match="cannot be written"):
        write_page(example(), tmp_path / "none" / "page.html")


@pytest.mark.parametrize("name", presets.preset_names())
def test_the_family_of_every_recipe_of_the_package_is_right(name: str) -> None:
    recipe = load_recipe(name)
    found = rows.family({"kind": "recipe", "name": name, "rotated": recipe.rotates})
    if name.startswith("gyro"):
        assert found == rows.OURS
    else:  # scales alone turn nothing
        plain = {
            "rtn",
            "gptq",
            "gptq-act-order",
            "gptaq",
            "qronos",
            "signround",
            "omniquant",
            "aqlm",
            "awq",
            "smoothquant",
        }
        assert found == (rows.UNROTATED if name in plain | {"bbt-absorbed"} else rows.PAPERS)
