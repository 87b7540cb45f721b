"""ResultFolder are written whole, read with care, and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gyroquant.benchmark.result_folder import ResultFolder
from gyroquant.errors import InputError
from gyroquant.system.files import put_json

DONE = {"key": "a" * 12, "status": "done", "reason": None}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    put_json(path, {"a": 1})
    with pytest.raises(TypeError):
        put_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_was_put_is_there_and_damage_is_told(tmp_path: Path) -> None:
    results = ResultFolder(tmp_path)
    assert results.get(DONE["key"]) is None
    results.put(DONE)
    assert results.get(DONE["key"]) == DONE
    for damage in ("{", "[]", '{"key": "b", "status": "done"}'):
        results.path(DONE["key"]).write_text(damage)
        with pytest.raises(InputError, match="delete it, and it is made again"):
            results.get(DONE["key"])


def test_a_success_elsewhere_replaces_a_failure_here(tmp_path: Path) -> None:
    mine, theirs = ResultFolder(tmp_path / "mine"), ResultFolder(tmp_path / "theirs")
    mine.put({**DONE, "status": "failed", "reason": "no memory"})
    theirs.put(DONE)
    assert mine.merge(tmp_path / "theirs") == 1
    assert mine.get(DONE["key"]) == DONE


def test_folders_are_merged_but_failures_stay_where_they_are(tmp_path: Path) -> None:
    mine, theirs = ResultFolder(tmp_path / "mine"), ResultFolder(tmp_path / "theirs")
    mine.put(DONE | {"whose": "mine"})
    theirs.put(DONE | {"whose": "theirs"})
    theirs.put(DONE | {"key": "b" * 12})
    theirs.put(DONE | {"key": "c" * 12, "status": "failed"})
    assert mine.merge(tmp_path / "theirs") == 1
    assert mine.get("a" * 12) == DONE | {"whose": "mine"}
    assert mine.get("b" * 12) is not None
    assert mine.get("c" * 12) is None
    with pytest.raises(InputError, match="holds no results to merge"):
        mine.merge(tmp_path / "nowhere")
