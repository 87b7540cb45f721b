"""What the command line makes of what it is given for a comparison."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import gyroquant as gq
from gyroquant.cli import app
from gyroquant.cli import compare as command
from gyroquant.cli.compare import _seconds

GIVEN = ["compare", "MODEL", "OUT", "--text", "t.txt", "--recipes", "gsr, gyro"]
FOUND: dict[str, Any] = {"cells": [], "notes": ["a grid"], "verdict": [], "original": {"tests": {}}}


def asked(monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    seen: list[Any] = []

    def compare(*given: Any, **options: Any) -> dict[str, Any]:
        seen.extend([given, options])
        return FOUND

    monkeypatch.setattr(command, "run_comparison", compare)
    done = CliRunner().invoke(app, [*GIVEN, *more])
    assert done.exit_code == 0, done.exception
    return seen[0], seen[1], done.output


def test_lists_numbers_and_times_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    more = [
        "--bits",
        "2,3",
        "--group-size",
        "64,-1",
        "--budget",
        "1.5h",
        "--external-tools",
        "nncf,llama.cpp:Q2_K",
        "--seeds",
        "3",
    ]
    given, options, printed = asked(monkeypatch, *more)
    assert given[1] == ["gsr", "gyro"]
    assert options["bits"] == [2, 3]
    assert options["group_sizes"] == [64, -1]
    assert options["limits"].budget == 5400
    assert options["external_tools"] == ["nncf", "llama.cpp:Q2_K"]
    assert options["seeds"] == 3
    assert "note: a grid" in printed
    assert "OUT/index.html" in printed


def test_the_old_name_of_external_tools_works_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(FutureWarning, match="--opponents is now --external-tools; the next release drops the old name"):
        options = asked(monkeypatch, "--opponents", "nncf")[1]
    assert options["external_tools"] == ["nncf"]


def test_old_words_of_python_work_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("gyroquant.benchmark.run_comparison", lambda *given, **rest: seen.append(given))
    with pytest.warns(FutureWarning) as caught:
        gq.compare("m", ["rtn"], "o", calibration="t", test="x", max_windows=3, window=8, opponents=["nncf"])  # type: ignore[call-arg]
    assert [str(one.message).partition("=")[0] for one in caught] == ["calibration", "max_windows", "opponents"]
    ((_, spec, _, text, tests),) = seen
    assert (spec.external_tools, text) == (["nncf"], "t")
    assert [(one.window, one.windows) for one in tests.values()] == [(8, 3)]
    with pytest.raises(TypeError, match=r"compare\(\) got an unexpected keyword .*'group_size'; .*'group_sizes'"):
        gq.compare("m", ["rtn"], "o", "t", "x", group_size=[64])


def test_json_is_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert '"a grid"' in asked(monkeypatch, "--json")[2]


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("45m", 2700), ("2 h", 7200), ("1d", 86400)])
def test_times(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-1h", "2w", ""])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(gq.InputError, match="--budget takes a time"):
        _seconds(text)


def test_what_is_no_number_is_refused() -> None:
    done = CliRunner().invoke(app, [*GIVEN, "--bits", "two"])
    assert isinstance(done.exception, gq.InputError)
    assert "--bits takes numbers" in str(done.exception)


def test_sizes_take_the_place_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch)[1]["bits"] is None
    options = asked(monkeypatch, "--sizes", "50MB, 66MB")[1]
    assert (options["bits"], options["sizes"]) == (None, ["50MB", "66MB"])
    assert asked(monkeypatch, "--sizes", "50MB", "--bits", "2")[1]["bits"] == [2]
    done = CliRunner().invoke(app, [*GIVEN, "--sizes", ","])
    assert "--sizes is empty: give sizes" in str(done.exception)
