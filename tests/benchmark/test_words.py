"""What is said around the tables: what sets a row apart, how far intervals are to be trusted, whose programs are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison_example import example, of_last_release

from gyroquant.benchmark import rows as rows
from gyroquant.benchmark.markdown import markdown
from gyroquant.benchmark.page import write_page
from gyroquant.benchmark.sentences import COVERAGE, introduction, notes
from gyroquant.evaluation.perplexity import interval


def page(comparison: dict[str, Any], folder: Path) -> str:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    write_page(comparison, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def lines(text: str, mark: str) -> set[str]:
    """The methods in the rows of tables that have a mark."""
    return {re.split(r" W\d", line)[0].strip("| ") for line in text.splitlines() if line[:1] == "|" and mark in line}


def test_what_sets_a_row_apart_stands_in_it(tmp_path: Path) -> None:
    comparison = example()
    text, shown = markdown(comparison), page(comparison, tmp_path)
    assert lines(text, "*over the budget*") == {"gsr", "quarot", "perq"}
    assert len(lines(text, "*dominated by gyro")) == 8
    assert lines(text, "*128 samples*") == {"gyro"}
    tests = len(rows.tests(comparison))
    assert shown.count(">over the budget</span>") == 3 * 3 * tests
    assert shown.count(">128 samples</span>") == 3 * 5 * tests  # as many seeds
    assert "over the budget (more than 88.7 MB at 2 bits, 102.2 MB at 3 bits" in notes(comparison)
    assert "A result is dominated if another one" in notes(comparison)
    assert "over the budget (more than 2.380 true bits at 2 bits, 3.380" in notes(of_last_release())
    for words in (text, shown):
        assert notes(comparison) in words


def test_the_introduction_tells_of_other_calibration() -> None:
    comparison = example()
    assert "calibrated on 64 samples of 512 tokens of enwiki, calibration, unless the tables" in introduction(
        comparison
    )
    for run in comparison["cells"]:
        run["nsamples"] = 64
    assert "enwiki, calibration and measured" in introduction(comparison)
    for run in comparison["cells"]:  # as results have been that do not say
        del run["nsamples"]
    assert "enwiki, calibration and measured" in introduction(comparison)


def test_how_often_intervals_from_few_windows_hold_is_said() -> None:
    comparison = example()
    assert "narrow" not in notes(comparison)
    comparison["texts"]["tests"]["c4"]["windows"] = 9
    assert "Intervals from 9 windows (on c4) are too narrow: they cover about 88 %." in notes(comparison)
    comparison["texts"]["tests"].pop("wikitext-2")
    comparison["verdict"] = []
    assert "Intervals from 9 windows are too narrow" in notes(comparison)


def test_that_is_how_often_they_do() -> None:
    samples = torch.randn(500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [interval(sample, 1) for sample in samples]
    assert 100 * sum(low < 0 < high for low, high in ends) / len(ends) == pytest.approx(COVERAGE[8], abs=3.5)


def test_a_program_that_is_recommended_is_told_with_its_home(tmp_path: Path) -> None:
    comparison = example()
    run = next(one for one in comparison["cells"] if one["name"] == "auto-round: default" and one["bits"] == 2)
    budget = comparison["verdict"][0]
    budget |= {"recommended": run["key"], "command": run["command"], "home": run["home"]}
    budget["text"] = "Use auto-round.\nDo not rotate."
    text, shown = markdown(comparison), page(comparison, tmp_path)
    assert f"```sh\n{run['command']}\n```\n\nThe tool's repository: somebody/auto-round\n" in text
    assert "Use auto-round.\n\nDo not rotate." in text
    verdict = shown[shown.index('id="verdict"') : shown.index('id="results"')]
    assert verdict.count("repository: somebody/auto-round<") == 1
    assert "auto-round: default W2 (somebody/auto-round)" in shown[shown.index('id="repeat"') :]
