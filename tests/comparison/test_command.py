"""The command that stands in a comparison asks for the same comparison."""

import shlex

import pytest
from typer.testing import CliRunner

from gyroquant.cli import app
from gyroquant.comparison import Wanted, _trials
from gyroquant.comparison.command import again

CASES = [
    (Wanted(recipes=["gsr"]), (["a b.txt"], ["bbt"], None, None), "float32", None),
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
            changes=("weights.solver=rtn", "seed=4"),
            keep_activations=True,
        ),
        (["a.txt", "b.txt"], ["bbt", "standard"], None, None),
        "bfloat16",
        2,
    ),
    (Wanted(recipes=["rtn"]), (["a.txt"], ["bbt"], 128, 3), "float32", 1),
    (Wanted(recipes=["rtn"]), (["a.txt"], ["bbt"], 128, None), "float32", 1),
]


@pytest.mark.parametrize("case", CASES)
def test_the_command_asks_for_the_same(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    wanted, measured, dtype, threads = case
    asked = {}
    monkeypatch.setattr("gyroquant.comparison.run", lambda *given, **more: asked.update(given=given, **more) or {})
    command = again("the model", wanted, "text file", _trials(*measured), dtype, threads)
    program, *words = shlex.split(command)
    CliRunner().invoke(app, words)
    model, found, _, text, tests = asked["given"]
    assert program == "gyroquant"
    assert (model, text, asked["dtype"], asked["limits"].threads) == ("the model", "text file", dtype, threads)
    assert {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in vars(found).items()} == {
        key: list(v) if isinstance(v, (list, tuple)) else v for key, v in vars(wanted).items()
    }
    assert tests == _trials(*measured)
