"""A comparison at equal bytes, from the models to the page."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
from comparison_example import of_sizes
from rich.table import Table
from small_comparisons import compared

import gyroquant as gq
from gyroquant.benchmark import rows as rows
from gyroquant.benchmark import running_cost
from gyroquant.benchmark.console import compared as printed
from gyroquant.benchmark.external_tools import ExternalTool, Size, Task, ToolResult
from gyroquant.benchmark.markdown import markdown
from gyroquant.benchmark.page import plots, write_page
from gyroquant.benchmark.sentences import introduction, notes
from gyroquant.registry import Registry

running = importlib.import_module("gyroquant.benchmark.execute")  # the package has a function of that name
QUICK = {"bits": None, "group_sizes": [32], "changes": ["weights.scale=minmax"]}
BUDGETS = {**QUICK, "sizes": ["40KB", "50KB"]}


class Program(ExternalTool):
    """An external tool whose files have 10,000 bytes a bit, and hold the original."""

    home, requirements, variants = "owner/name", ("program==1",), {"fast": {}}

    def problem(self, variant: str, size: Size) -> str:
        return "" if size.bits in (4, 5) else f"it has no type of {size.bits} bits"

    def run(self, variant: str, task: Task, python: Path) -> ToolResult:
        total = 10_000 * task.size.bits
        return ToolResult(task.model, 2.5, total, 3.0, 10**9, {"program": "1"}, total, {"total": total})


def test_every_budget_is_kept_and_judged_by_itself(
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    in_process: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tools: Registry[type[ExternalTool]],
) -> None:
    monkeypatch.setattr(running, "BASELINES", ("rtn",))
    tools.add("program", Program)
    monkeypatch.setattr("gyroquant.benchmark.external_tools.environment.python_of", lambda *given: Path("/python"))
    monkeypatch.setattr(running_cost, "_TOKENS", 2)
    found = compared(folders["llama_tied"], corpus, tmp_path, ["quarot"], external_tools=["program"], **BUDGETS)
    first = list(in_process)
    again = compared(folders["llama_tied"], corpus, tmp_path, ["quarot"], external_tools=["program"], **BUDGETS)
    assert in_process == first  # nothing is run twice
    assert again == found
    cells = {(run["name"], run["max_bytes"]): run for run in found["cells"]}
    assert set(cells) == {(name, size) for name in ("rtn", "quarot", "program: fast") for size in (40_000, 50_000)}
    for (_, size), run in cells.items():
        assert run["status"] == "done"
        assert run["weight_bytes"]["total"] <= size
        assert run["weight_bytes"].get("head", 0) == 0  # the head is tied in all
    assert cells["program: fast", 50_000]["weight_bytes"]["total"] == 50_000
    assert cells["program: fast", 40_000]["weight_bytes"]["total"] == 40_000
    assert cells["rtn", 50_000]["weight_bytes"]["total"] > cells["rtn", 40_000]["weight_bytes"]["total"]
    assert [(one["max_bytes"], one["limit"]) for one in found["verdict"]] == [(40_000, 40_000), (50_000, 50_000)]
    assert {row["key"] for row in found["verdict"][0]["rows"]} == {
        run["key"] for run in found["cells"] if run["max_bytes"] == 40_000
    }
    assert found["verdict"][0]["over"] == []
    words = shlex.split(found["command"])
    assert words[words.index("--sizes") + 1] == "40KB,50KB"
    assert "--bits" not in words

    # what a runtime pays for online maps
    speeds = {run["name"]: run.get("speed") for run in found["cells"]}
    assert speeds["program: fast"] is None
    assert speeds["rtn"]["online_maps"] == 0
    assert speeds["quarot"]["online_maps"] > 2  # R4 in two blocks, and R1 turned back for the tied head
    for speed in (speeds["rtn"], speeds["quarot"]):
        assert speed["decode_tokens_per_second"] > 0
        assert speed["original_decode_tokens_per_second"] > 0
        assert (speed["runtime"], speed["written"]) == ("transformers, fp32", 2)
    text = found["verdict"][0]["text"]
    assert "Time to quantize: " in text
    assert "Tokens a second in transformers, fp32: " in text
    assert " minutes" in text


def test_a_speed_that_cannot_be_measured_is_a_warning(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_cost, "available_memory", lambda: 1000)
    monkeypatch.setattr(running, "BASELINES", ("rtn",))
    made = compared(folders["llama_tied"], corpus, tmp_path, [], **QUICK, sizes=[50_000])
    for run in made["cells"]:
        assert run["status"] == "done"
        assert "speed" not in run
        assert run["warnings"][-1].startswith("its tokens a second were not measured: two models in fp32 take ")


def test_bits_and_sizes_are_two_blocks_of_runs(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_cost, "_TOKENS", 1)
    monkeypatch.setattr(running, "BASELINES", ("rtn",))
    made = compared(folders["llama_tied"], corpus, tmp_path, [], **QUICK | {"bits": [2], "sizes": ["50KB"]})
    assert [(run["label"], run.get("max_bytes")) for run in made["cells"]] == [
        ("rtn W2 g32", None),
        ("rtn 50.0 kB g32", 50_000),
    ]
    assert [one["bits"] for one in made["verdict"]] == [2, None]
    assert "at 2 bits and within 50.0 kB" in introduction(made)
    text = (tmp_path / "comparison.md").read_text()
    assert "### 2 bits" in text
    assert "### 50.0 kB" in text


def test_bad_input_is_refused_before_any_work(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, message in (
        ({"sizes": ["50 apples"]}, "--sizes: '50 apples' is not a size"),
        ({"sizes": []}, "--bits is empty"),
        ({"sizes": ["10KB"]}, "no recipe takes as little as 10.0 kB. The smallest size that is possible is 0.03"),
        ({"sizes": ["50KB"], "seeds": [0, 1]}, r"--seeds is the number of seeds, such as 3, not a list of them"),
        ({"sizes": ["50KB"], "changes": ["weights.bits=2"]}, "--set weights.bits=2: --sizes chooses the bits"),
        ({"sizes": ["50KB"], "external_tools": ["nobody"]}, "there is no external tool 'nobody'"),
    ):
        with pytest.raises(gq.InputError, match=message):
            compared(folders["llama_tied"], corpus, out, [], **{"bits": [] if not changes["sizes"] else None} | changes)
    assert not out.exists()


def test_page_and_tables_have_budgets_of_bytes(tmp_path: Path) -> None:
    comparison = of_sizes()
    text = markdown(comparison)
    for size in ("50.0 MB", "66.0 MB", "82.0 MB"):
        assert f"### {size}\n" in text
        assert f"## {size}, c4\n" in text
    assert "within 50.0 MB, 66.0 MB, 82.0 MB" in introduction(comparison)
    assert "| Tokens/s |" in text
    assert "7.5 (0.75 of the original's, 30 online maps)" in text
    assert "Within a budget of bytes" in notes(comparison)
    assert "Tokens a second are those of our own folders" in notes(comparison)
    budget = next(column for column in rows.columns(comparison) if column.key == "bits")
    assert {budget.text(row) for row in rows.rows(comparison, "c4")} == {"50.0 MB", "66.0 MB", "82.0 MB"}
    titles = [str(part.title) for part in printed(comparison, "OUT") if isinstance(part, Table)]
    assert titles[0].startswith("50.0 MB on wikitext-2")
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    write_page(comparison, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<span class="bits">50.0</span> MB</h3>' in page
    assert '<option value="50000000">50.0 MB</option>' in page
    assert '<tr data-bits="50000000"' in page
    spec = plots(comparison)["pareto"]
    assert {point["budget"] for point in spec["data"]["values"]} == {50_000_000, 66_000_000, 82_000_000}
    (legend,) = {str(layer["encoding"]["shape"]["legend"]) for layer in spec["layer"] if "shape" in layer["encoding"]}
    assert '"50000000": "50.0 MB"' in legend
