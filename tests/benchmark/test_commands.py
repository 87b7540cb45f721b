"""The commands that stand in a comparison ask for the same comparison, and for the same run."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner

from gyroquant.benchmark import ComparisonSpec, _evaluation_texts
from gyroquant.benchmark.commands import ComparisonRequest
from gyroquant.benchmark.runs import Conditions, Run, plan_runs, with_keys
from gyroquant.cli import app
from gyroquant.models.graph.model_graph import ModelGraph
from gyroquant.models.stores.source import open_model

CASES = [
    (ComparisonSpec(recipes=["gsr"]), (["a b.txt"], ["bbt"], None, None), "float32", 3),
    (
        ComparisonSpec(
            recipes=["gsr", "x.yaml"],
            external_tools=["nncf:symmetric GPTQ", "llama.cpp"],
            bits=(2, 4),
            group_sizes=(32, -1),
            symmetric=True,
            seeds=(0, 1),
            nsamples=3,
            seqlen=7,
            tasks=("a", "b"),
            task_limit=9,
            task_seed=5,
            task_text="a text.txt",
            effort="light",
            changes=("weights.solver=rtn", "calibration.dtype=float32"),
            keep_activations=True,
        ),
        (["a.txt", "b.txt"], ["bbt", "standard"], None, None),
        "bfloat16",
        2,
    ),
    (ComparisonSpec(recipes=["rtn"]), (["a.txt"], ["bbt"], 128, 3), "float32", 1),
    (ComparisonSpec(recipes=["rtn"]), (["a.txt"], ["bbt"], 128, None), "float32", 1),
    (ComparisonSpec(recipes=["rtn"]), (["a.txt"], ["bbt"], None, 5), "float32", 1),
    (ComparisonSpec(recipes=["rtn"]), (["a.txt"], ["standard"], None, 5), "float32", 1),
]


def test_windows_alone_keep_the_length_of_the_preset() -> None:
    assert [(one.window, one.windows) for one in _evaluation_texts(["a.txt"], ["bbt"], None, 5).values()] == [(1024, 5)]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a comparison was called with last."""
    seen: dict[str, Any] = {}
    run = lambda *given, **more: seen.update(given=given, **more) or {}  # noqa: E731
    monkeypatch.setattr("gyroquant.benchmark.run_comparison", run)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_the_command_asks_for_the_same(case: tuple[Any, ...], called: dict[str, Any]) -> None:
    spec, measured, dtype, threads = case
    tests = _evaluation_texts(*measured)
    program, *words = shlex.split(ComparisonRequest("the model", spec, "text file", tests, dtype).command(threads))
    CliRunner().invoke(app, words)
    model, found, _, text, others = called["given"]
    assert program == "gyroquant"
    assert (model, text, called["dtype"], called["limits"].threads) == ("the model", "text file", dtype, threads)
    assert {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in vars(found).items()} == {
        key: list(v) if isinstance(v, (list, tuple)) else v for key, v in vars(spec).items()
    }
    assert others == tests


def test_the_command_of_another_programs_run_makes_that_cell(called: dict[str, Any]) -> None:
    graph = open_model(tiny_models.build("llama")).graph
    spec = ComparisonSpec(
        recipes=["gyro"],
        external_tools=["nncf", "llama.cpp", "auto-round", "brevitas"],
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
    tests = _evaluation_texts(["a b.txt", "c.txt"], ["bbt"], 32, 4)
    request = ComparisonRequest("the model", spec, "text file", tests, "bfloat16")
    found = _external_tools(spec, graph)
    assert len(found) > 40
    for run in found:
        command = request.with_command(run, 5).command
        CliRunner().invoke(app, shlex.split(command)[1:])
        model, alone, _, text, others = called["given"]
        assert (model, text, others) == ("the model", "text file", tests)
        assert (called["dtype"], called["limits"].threads) == ("bfloat16", 5)
        assert (list(alone.tasks), alone.task_limit) == (["a"], 9)
        assert [one.key for one in _external_tools(alone, graph)][run.seed :] == [run.key]


def _external_tools(spec: ComparisonSpec, graph: ModelGraph) -> list[Run]:
    conditions = Conditions("model", {}, {}, "float32", {})
    return [run for run in with_keys(plan_runs(spec, "m", graph, "t"), conditions) if run.kind == "opponent"]
