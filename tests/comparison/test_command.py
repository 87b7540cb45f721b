"""The commands that stand in a comparison ask for the same comparison, and for the same cell."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from gyroquant.cli import app
from gyroquant.comparison import Wanted, _trials
from gyroquant.comparison.cells import Cell, Conditions, all_named, grid
from gyroquant.comparison.command import Asked
from gyroquant.models.graph import ModelGraph
from gyroquant.models.source import open_model

CASES = [
    (Wanted(recipes=["gsr"]), (["a b.txt"], ["bbt"], None, None), "float32", 3),
    (
        Wanted(
            recipes=["gsr", "x.yaml"],
            opponents=["nncf:symmetric GPTQ", "llama.cpp"],
            bits=(2, 4),
            group_sizes=(32, -1),
            symmetric=True,
            seeds=(0, 1),
            nsamples=3,
            seqlen=7,
            tasks=("a", "b"),
            task_limit=9,
            effort="light",
            changes=("weights.solver=rtn", "calibration.dtype=float32"),
            keep_activations=True,
        ),
        (["a.txt", "b.txt"], ["bbt", "standard"], None, None),
        "bfloat16",
        2,
    ),
    (Wanted(recipes=["rtn"]), (["a.txt"], ["bbt"], 128, 3), "float32", 1),
    (Wanted(recipes=["rtn"]), (["a.txt"], ["bbt"], 128, None), "float32", 1),
    (Wanted(recipes=["rtn"]), (["a.txt"], ["bbt"], None, 5), "float32", 1),
    (Wanted(recipes=["rtn"]), (["a.txt"], ["standard"], None, 5), "float32", 1),
]


def test_windows_alone_keep_the_length_of_the_preset() -> None:
    assert [(one.window, one.windows) for one in _trials(["a.txt"], ["bbt"], None, 5).values()] == [(1024, 5)]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a comparison was called with last."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("gyroquant.comparison.run", lambda *given, **more: asked.update(given=given, **more) or {})
    return asked


@pytest.mark.parametrize("case", CASES)
def test_the_command_asks_for_the_same(case: tuple[Any, ...], called: dict[str, Any]) -> None:
    wanted, measured, dtype, threads = case
    tests = _trials(*measured)
    program, *words = shlex.split(Asked("the model", wanted, "text file", tests, dtype).again(threads))
    CliRunner().invoke(app, words)
    model, found, _, text, others = called["given"]
    assert program == "gyroquant"
    assert (model, text, called["dtype"], called["limits"].threads) == ("the model", "text file", dtype, threads)
    assert {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in vars(found).items()} == {
        key: list(v) if isinstance(v, (list, tuple)) else v for key, v in vars(wanted).items()
    }
    assert others == tests


def test_the_command_of_another_programs_cell_makes_that_cell(called: dict[str, Any]) -> None:
    graph = open_model(tiny.build("llama")).graph
    wanted = Wanted(
        recipes=["gyro"],
        opponents=["nncf", "llama.cpp", "auto-round", "brevitas"],
        bits=(2, 4),
        group_sizes=(32, -1),
        nsamples=3,
        seqlen=7,
        seeds=(0, 1),
        effort="light",
        changes=["weights.solver=rtn"],
        tasks=("a",),
        task_limit=9,
    )
    tests = _trials(["a b.txt", "c.txt"], ["bbt"], 32, 4)
    asked = Asked("the model", wanted, "text file", tests, "bfloat16")
    found = _opponents(wanted, graph)
    assert len(found) > 40
    for cell in found:
        command = asked.with_command(cell, 5).command
        CliRunner().invoke(app, shlex.split(command)[1:])
        model, alone, _, text, others = called["given"]
        assert (model, text, others) == ("the model", "text file", tests)
        assert (called["dtype"], called["limits"].threads) == ("bfloat16", 5)
        assert (list(alone.tasks), alone.task_limit) == (["a"], 9)
        assert [one.key for one in _opponents(alone, graph)][cell.seed :] == [cell.key]


def _opponents(wanted: Wanted, graph: ModelGraph) -> list[Cell]:
    conditions = Conditions("model", {}, {}, "float32", {})
    return [cell for cell in all_named(grid(wanted, "m", graph, "t"), conditions) if cell.kind == "opponent"]
