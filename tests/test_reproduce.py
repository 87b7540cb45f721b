"""The rows of results that anybody can repeat are those of the tables, and repeating one says whether it matches."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import reproduce

import gyroquant as gq
from gyroquant.recipes.size import parse_size, with_size

ROOT = Path(__file__).parent.parent
ROWS = reproduce.read_rows()


def lines(page: str) -> list[list[str]]:
    """The cells of the rows of all tables of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in text if line.startswith("|")]


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("head_to_head/")])
def test_rows_are_those_of_the_tables(name: str) -> None:
    row = ROWS[name]
    (cells,) = [cells for cells in lines(row["page"]) if cells[0] == row["line"].strip("*")][:1]
    size = f"{row['megabytes']:.{row['megabyte_digits']}f}"
    perplexity = f"{row['perplexity']:,}"
    assert size in cells or f"{size} MB" in cells
    assert perplexity in cells
    assert f"{row['layer_bits']}" in cells
    if row["interval"]:
        assert "{:,} to {:,}".format(*row["interval"]) in cells
    recipe = gq.load_recipe(row["recipe"], row["changes"], row["effort"])
    if row["size"]:
        assert with_size(recipe, parse_size(row["size"])).weights.allocate is not None


def test_rows_of_head_to_head_are_those_of_its_json() -> None:
    comparison = json.loads((ROOT / "docs/results/head_to_head/comparison.json").read_text())
    cells, named = {cell["key"]: cell for cell in comparison["cells"]}, 0
    for name, row in ROWS.items():
        if not name.startswith("head_to_head/"):
            continue
        cell = cells[row["line"]]
        (score,) = cell["tests"].values()
        assert name == f"head_to_head/{cell['name']}-w{cell['bits']}"
        assert row["perplexity"] == round(score["perplexity"], 4)
        assert row["interval"] == [round(end, 4) for end in score["perplexity_interval"]]
        assert row["layer_bits"] == cell["true_bits"]
        words = shlex.split(cell["command"])
        assert row["recipe"] == words[words.index("--recipe") + 1]
        assert row["changes"] == [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        assert row["calibration_sha256"] == comparison["texts"]["calibration"]["sha256"]
        assert [row["test_sha256"]] == [test["sha256"] for test in comparison["texts"]["tests"].values()]
        named += 1
    assert named >= 20


def test_rows_are_listed_without_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([]) == 0
    printed = capsys.readouterr().out
    for name in ("demo/gptq-w2", "whole_file/gyro-w2", "head_to_head/gsr-w3"):
        assert name in printed
    with pytest.raises(gq.InputError, match="there is no row 'demo/gptq-w22'; did you mean 'demo/gptq-w2'"):
        reproduce.main(["demo/gptq-w22"])


@pytest.fixture
def tiny(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A row of a tiny model, as it was measured by hand, and the arguments that repeat it."""
    changes = ["weights.group_size=32", "calibration.nsamples=4", "calibration.seqlen=32"]
    gq.quantize(folders["llama"], gq.load_recipe("rtn-w3", changes), corpus, tmp_path / "by-hand")
    found = gq.evaluate(tmp_path / "by-hand", corpus, window=32, windows=4)
    row = ROWS["demo/rtn-w2"] | {"recipe": "rtn-w3", "changes": changes, "window": 32, "windows": 4}
    row |= {"perplexity": found["perplexity"], "interval": found["perplexity_interval"]}
    row |= {
        "bytes": found["bytes"]["total"],
        "megabytes": round(found["bytes"]["total"] / 1e6, 4),
        "megabyte_digits": 4,
    }
    row |= {"layer_bits": found["true_bits_per_weight"], "calibration_sha256": None, "test_sha256": None}
    paths = {"--model": folders["llama"], "--calibration": corpus, "--test": corpus, "--out": tmp_path / "out"}
    arguments = [str(word) for pair in paths.items() for word in pair]
    return {"row": row, "arguments": ["tiny/rtn", "--rows", str(tmp_path / "rows.json"), *arguments]}


def run(tiny: dict[str, Any], **changes: Any) -> tuple[int, dict[str, Any]]:
    words = tiny["arguments"]
    Path(words[2]).write_text(json.dumps({"rows": {"tiny/rtn": tiny["row"] | changes}}))
    code = reproduce.main(words)
    return code, json.loads((Path(words[-1]) / "tiny-rtn.json").read_text())


def test_a_row_that_matches_and_rows_that_do_not(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(tiny)
    assert code == 0
    assert result["verdict"] == {
        "perplexity": True,
        "size": True,
        "layer_bits": True,
        "matches": True,
        "other_texts": [],
    }
    assert result["found"]["perplexity"] == pytest.approx(tiny["row"]["perplexity"], rel=1e-6)
    assert "tiny/rtn matches" in capsys.readouterr().out

    low, high = tiny["row"]["interval"]
    code, result = run(tiny, interval=[high + 1, high + 2], calibration_sha256="another")
    assert (code, result["verdict"]["perplexity"], result["verdict"]["size"]) == (1, False, True)
    assert result["verdict"]["other_texts"] == ["calibration"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "The calibration text is not that of the table" in printed
    assert "tiny/rtn does not match" in printed

    code, result = run(tiny, bytes=result["found"]["bytes"] + 1)
    assert (code, result["verdict"]["size"]) == (1, False)
    code, result = run(
        tiny, bytes=None, interval=None, perplexity=(low + high) / 2, megabytes=tiny["row"]["megabytes"] + 0.0001
    )
    assert (code, result["verdict"]["perplexity"], result["verdict"]["size"]) == (1, True, False)
    with pytest.raises(gq.InputError, match="holds a result of another recipe: delete it"):
        run(tiny, recipe="rtn-w2")


def test_a_size_is_kept_where_bits_are_chosen() -> None:
    row = ROWS["whole_file/60MB-light"]
    found = {"perplexity": 39.0, "interval": [30.0, 50.0], "layer_bits": 3.41, "bytes": 59_990_000}
    found |= {"calibration_sha256": None, "test_sha256": None}
    assert reproduce.judged(row, found)["matches"]
    for size in (60_000_001, 59_000_000):
        assert reproduce.judged(row, found | {"bytes": size})["size"] is False
    assert not reproduce.judged(row, found | {"interval": [40.0, 50.0]})["perplexity"]
