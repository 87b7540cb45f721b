"""Results that 0.1.0 has stored are found again, shown and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from comparison_example import of_last_release
from small_comparisons import compared

from gyroquant.benchmark.page import write_page
from gyroquant.benchmark.runs import ComparisonSpec, Conditions, plan_runs, with_keys
from gyroquant.models.stores.source import open_model

# What 0.1.0 called the results of every recipe and external tool, under CONDITIONS.
KEYS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "keys_of_0_1_0.json").read_text())
# 0.1.0 had these tools leave embedding and head as they are; now they do what they do by default. These recipes of ours
# round both.
CHANGED = ("llama.cpp", "nncf", "gyro-w2 ", "gyro-w3 ", "gyro-w4 ")
CHANGED_ACTIVATIONS = ("gyro-w4a4kv4 ",)
TOOLS = ("nncf", "llama.cpp", "auto-round", "brevitas", "gptqmodel", "llm-compressor")
CONDITIONS = Conditions(
    "model",
    {"tokens": "t", "seqlen": 32},
    {"x": {"window": 32, "windows": 4}},
    "float32",
    {"gyroquant": "0.1.0"},
    {"arc": 3},
)


@pytest.mark.parametrize("stored", KEYS["runs"], ids=lambda stored: "-".join(stored["options"]) or "plain")
def test_stored_results_keep_their_names(stored: dict[str, Any]) -> None:
    graph = open_model(tiny_models.build("llama")).graph
    spec = ComparisonSpec(**KEYS["spec"], **stored["options"], external_tools=TOOLS)
    runs = with_keys(plan_runs(spec, "m", graph, "t"), CONDITIONS)
    keys: dict[str, str] = {}
    for run in runs:
        keys.setdefault(f"{run.label}, seed {run.seed}", run.key)
    others = CHANGED + (CHANGED_ACTIVATIONS if stored["options"].get("keep_activations") else ())
    same = {name: key for name, key in stored["keys"].items() if not name.startswith(others)}
    assert {name: keys.get(name) for name in same} == same
    changed = {name: key for name, key in stored["keys"].items() if name.startswith(others)}
    assert changed
    assert not changed.items() & keys.items()
    assert stored["options"].get("effort") or changed.keys() <= keys.keys()  # light efforts have other groups too


def test_the_layout_of_a_result_folder_is_that_of_0_1_0(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    """A folder of 0.1.0 has its results in cells/KEY.json and the kinds "recipe" and "opponent"."""
    comparison = compared(folders["llama"], corpus, tmp_path / "out", [], external_tools=["gptqmodel:GPTQ + rotation"])
    assert {run["kind"] for run in comparison["cells"]} == {"recipe", "opponent"}
    stored = [run["key"] for run in comparison["cells"] if run["status"] == "done"]
    assert sorted(path.stem for path in (tmp_path / "out" / "cells").iterdir()) == sorted(stored)
    result = json.loads((tmp_path / "out" / "cells" / f"{stored[0]}.json").read_text())
    assert {"key", "kind", "name", "bits", "status", "reason", "tests", "measured", "layers", "outliers"} <= set(result)
    compared(folders["llama"], corpus, tmp_path / "merged", [], merge=[tmp_path / "out"])
    assert in_process == ["rtn W2 g16", "gptq W2 g16"]


def test_a_page_of_a_comparison_of_0_1_0_can_be_made(tmp_path: Path) -> None:
    """It has `opponents` among its settings."""
    comparison = copy.deepcopy(of_last_release())
    comparison["settings"].pop("external_tools", None)
    comparison["settings"]["opponents"] = ["nncf"]
    write_page(comparison, tmp_path / "index.html")
    assert "nncf" in (tmp_path / "index.html").read_text()
