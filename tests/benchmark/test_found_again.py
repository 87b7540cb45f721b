"""What a result is found by, and what it tells of how it was made."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from small_comparisons import SMALL, compared

import gyroquant as gq
from gyroquant.benchmark import worker
from gyroquant.evaluation.perplexity import PRESETS


def test_other_names_of_the_same_windows_find_the_same_runs(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "bbt", (32, 4))
    first = compared(folders["llama"], corpus, tmp_path / "out", [])
    words = shlex.split(first["command"])
    assert words[words.index("--preset") + 1] == "bbt"  # which is what the windows that were asked for are called
    (tmp_path / "copy.txt").write_text(corpus.read_text())
    other = {**SMALL, "window": None, "windows": None}
    found = gq.compare(folders["llama"], [], tmp_path / "out", corpus, tmp_path / "copy.txt", **other)
    assert len(in_process) == 2
    assert [list(run["tests"]) for run in first["cells"]] == [["corpus.txt, bbt"]] * 2  # what was asked for by number
    assert [list(run["tests"]) for run in found["cells"]] == [["copy.txt, bbt"]] * 2
    assert [judged["test"] for judged in found["verdict"]] == ["copy.txt, bbt"]
    assert list(found["original"]["tests"].values()) == list(first["original"]["tests"].values())
    assert found["texts"]["tests"]["copy.txt, bbt"]["tokens"] == 128


def test_another_tokenizer_is_another_comparison(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    other = tmp_path / "model"
    shutil.copytree(folders["llama"], other)
    first = compared(other, corpus, tmp_path / "out", [])
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w3"], words["w4"] = words["w4"], words["w3"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = compared(other, corpus, tmp_path / "out", [])
    assert len(in_process) == 4
    assert not {run["key"] for run in first["cells"]} & {run["key"] for run in found["cells"]}
    losses = [[score["loss"] for run in one["cells"] for score in run["tests"].values()] for one in (first, found)]
    assert losses[0] != losses[1]


def test_texts_of_one_name_are_all_measured_on(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    for name, seed in (("en", 1), ("de", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my test.txt").write_text(tiny_models.prose(400, seed))
    (tmp_path / "en" / "my_test.txt").write_text(tiny_models.prose(400, 3))
    tests = [tmp_path / "en" / "my test.txt", tmp_path / "de" / "my test.txt", tmp_path / "en" / "my_test.txt"]
    found = gq.compare(folders["llama"], [], tmp_path / "out", corpus, tests, **SMALL)
    names = [f"{name}, 4 windows of 32" for name in ("en/my test.txt", "de/my test.txt", "my_test.txt")]
    assert list(found["cells"][0]["tests"]) == names
    assert len({score["loss"] for score in found["cells"][0]["tests"].values()}) == 3


def test_runs_that_ran_differently_are_told_and_the_command_has_the_threads_of_all(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    def ran_with(**changes: Any) -> dict[str, Any]:
        """The comparison again, with another past of its first runs."""
        for run in compared(folders["llama"], corpus, tmp_path, [])["cells"]:
            path = tmp_path / "cells" / f"{run['key']}.json"
            result = json.loads(path.read_text())
            result["versions"] |= changes[run["name"]]
            path.write_text(json.dumps(result))
        return compared(folders["llama"], corpus, tmp_path, [])

    alike = {"threads": 7, "cpu_capability": "AVX2"}
    found = ran_with(rtn=alike, gptq=alike)
    assert found["notes"] == []
    assert found["command"].endswith("--threads 7")
    found = ran_with(rtn=alike, gptq={"threads": 1, "cpu_capability": "AVX2"})
    (note,) = found["notes"]
    assert "1 with 1 thread (AVX2), 1 with 7 threads (AVX2)" in note
    (note,) = ran_with(rtn=alike, gptq={"threads": 7, "cpu_capability": "AVX512"})["notes"]
    assert "1 with 7 threads (AVX2), 1 with 7 threads (AVX512)" in note
    assert len(in_process) == 2


def test_work_is_counted_in_passes_of_the_runs_own_process(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "forward_seconds", lambda store, tokens: len(tokens) / 8)
    monkeypatch.setattr("gyroquant.benchmark.shared_measurements.forward_seconds", lambda store, tokens: 3.0)

    def passes(nsamples: int) -> list[float]:
        changes = ["calibration.nsamples=4"]  # of everybody, whatever is matched
        found = compared(folders["llama"], corpus, tmp_path, [], nsamples=nsamples, changes=changes)
        return [run["measured"]["seconds"] / run["forward_equivalents"] for run in found["cells"]]

    assert passes(4) == pytest.approx([0.5, 0.5])
    assert passes(8) == pytest.approx([1.0, 1.0])  # what was measured on 4 windows, for 8
    assert len(in_process) == 2
    for path in (tmp_path / "cells").iterdir():
        result = json.loads(path.read_text())
        assert result["measured"].pop("forward_windows") == 4
        del result["measured"]["forward_seconds"]
        path.write_text(json.dumps(result))
    assert passes(4) == pytest.approx([3.0, 3.0])  # the folder's
