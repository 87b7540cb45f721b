"""A comparison runs what is missing, once, survives being killed, and ends the same."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from filelock import FileLock
from small_comparisons import SMALL, compared

import gyroquant as gq
from gyroquant.benchmark import Limits, worker
from gyroquant.benchmark.external_tools import ExternalTool, ExternalToolError, Size, Task, ToolResult
from gyroquant.registry import Registry
from gyroquant.system import subprocesses as processes

running = importlib.import_module("gyroquant.benchmark.execute")  # the package has a function of that name


def lasting(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison without what a clock said."""
    runs = [
        {k: v for k, v in run.items() if k not in ("measured", "forward_equivalents")} for run in comparison["cells"]
    ]
    return {**comparison, "cells": runs}


def test_everything_is_measured_once_and_said_three_times(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    out = tmp_path / "out"
    found = compared(folders["llama"], corpus, out, ["quarot"], seeds=2)
    assert in_process == ["rtn W2 g16", *["gptq W2 g16", "quarot W2 g16"] * 2]
    assert [run["seed"] for run in found["cells"]] == [0, 0, 1, 0, 1]
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(found))
    assert (out / "comparison.md").exists()
    assert (out / "index.html").exists()
    first, second = ({k: one["perplexity"] for k, one in run["tests"].items()} for run in found["cells"][1:3])
    assert first != second  # calibrated on other windows
    quarot = found["cells"][3]
    own = gq.load_recipe("quarot", ["weights.bits=2", "weights.group_size=16", "weights.symmetric=false"])
    own = gq.load_recipe(own, ["activations=null", "kv_cache=null", "calibration.nsamples=4", "calibration.seqlen=32"])
    gq.quantize(folders["llama"], own, corpus, tmp_path / "alone")
    alone = gq.evaluate(tmp_path / "alone", corpus, folders["llama"], window=32, windows=4)
    (score,) = quarot["tests"].values()
    assert score["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert score["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    assert quarot["true_bits"] == alone["true_bits_per_weight"]
    assert 0 < quarot["proof_error"] < 1e-4
    assert quarot["rotated"] is True
    assert {layer["block"] for layer in quarot["layers"]} == {0, 1}
    assert {layer["module"] for layer in quarot["layers"]} >= {"self_attn.q_proj", "mlp.down_proj"}
    assert {row["site"] for row in quarot["outliers"]} == {"attn_in", "R2", "mlp_in", "R4"}
    assert quarot["outliers"][0]["mass"]["16"][0] >= quarot["outliers"][0]["mass"]["16"][1]
    assert len(found["verdict"]) == 1
    assert len(found["verdict"][0]["rows"]) == 3  # seeds are one row

    again = compared(folders["llama"], corpus, out, ["quarot"], seeds=2)
    assert len(in_process) == 5
    assert again == found


def test_what_is_new_is_run_and_folders_are_merged(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    compared(folders["llama"], corpus, tmp_path / "a", [])
    compared(folders["llama"], corpus, tmp_path / "b", ["quarot"], merge=[tmp_path / "a"])
    assert in_process == ["rtn W2 g16", "gptq W2 g16", "quarot W2 g16"]
    found = compared(folders["llama"], corpus, tmp_path / "a", ["quarot"], merge=[tmp_path / "b"])
    assert len(in_process) == 3
    assert all(run["status"] == "done" for run in found["cells"])


def test_a_loss_that_is_not_finite_is_a_failure(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)  # logits beyond what fp32 holds
    model.save_pretrained(tmp_path / "broken")
    tiny_models.tokenizer().save_pretrained(tmp_path / "broken")
    monkeypatch.setattr(worker, "_recipe", lambda spec, scratch: {"place": tmp_path / "broken"})
    found = compared(folders["llama"], corpus, tmp_path / "out", [])
    assert [run["status"] for run in found["cells"]] == ["failed", "failed"]
    assert "its loss is " in found["cells"][0]["reason"]
    result = json.loads((tmp_path / "out" / "cells" / f"{found['cells'][0]['key']}.json").read_text())
    assert result["versions"]["threads"] >= 1


def test_paths_of_logs_do_not_depend_on_where_a_run_runs(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, logs = running.run_in_worker, list[Path]()

    def run_in_worker(spec: Any, log: Path, processes: Any) -> dict[str, Any]:
        logs.append(log)
        assert all(Path(spec[name]).is_absolute() for name in ("model", "calibration", "matched", "scratch"))
        return usual(spec, log, processes)

    monkeypatch.setattr(running, "run_in_worker", run_in_worker)
    monkeypatch.chdir(tmp_path)
    found = compared(folders["llama"], corpus, Path("out"), [])
    assert logs == [tmp_path / "out" / "logs" / f"{run['key']}.log" for run in found["cells"]]


def test_a_failure_is_a_row_with_its_reason_and_is_tried_again(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = lambda *given: (_ for _ in ()).throw(gq.ProofError("folding R1 changed the model"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(worker.pipeline, "run", broken)
        found = compared(folders["llama"], corpus, tmp_path, [])
    assert [(run["status"], run["reason"]) for run in found["cells"]] == [
        ("failed", "folding R1 changed the model")
    ] * 2
    assert found["verdict"] == []
    found = compared(folders["llama"], corpus, tmp_path, [])
    assert [run["status"] for run in found["cells"]] == ["done", "done"]


def test_what_other_windows_calibrate_is_a_row_that_asks_for_no_more_text(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    found = compared(folders["llama"], corpus, tmp_path, ["gsr-w2g16"])  # 128 windows of 512, which the text has not
    assert [run["status"] for run in found["cells"]] == ["done", "done", "refused"]
    assert found["cells"][2]["reason"] == "it calibrates on windows of 512 tokens, all other runs on 32"


def test_a_folder_that_has_nothing_of_a_comparison_is_told(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("gyroquant.system.progress.Progress.warn", lambda self, text: told.append(text))
    compared(folders["llama"], corpus, tmp_path / "a", [], bits=[3])
    compared(folders["llama"], corpus, tmp_path / "b", [], merge=[tmp_path / "a"])
    assert told == [
        f"{tmp_path / 'a'} has no result of this comparison: its results are of another model, text, recipe or version"
    ]
    compared(folders["llama"], corpus, tmp_path / "b", [], bits=[2, 3], merge=[tmp_path / "a"])
    assert len(told) == 1


def test_a_budget_begins_nothing_that_would_not_be_done(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str]
) -> None:
    compared(folders["llama"], corpus, tmp_path, [], bits=[2])
    found = compared(folders["llama"], corpus, tmp_path, [], bits=[2, 3], limits=Limits(budget=1e-6))
    assert [run["status"] for run in found["cells"]] == ["done", "missing", "done", "missing"]
    assert "no time for it in the budget" in found["cells"][1]["reason"]
    assert len(in_process) == 2


def test_bad_input_is_refused_before_any_work(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, message in (
        ({"dtype": "float8"}, "dtype 'float8' is not supported"),
        ({"presets": ["large"], "window": None, "windows": None}, "there is no preset 'large'"),
        ({"presets": ["bbt", "standard"], "window": None}, "--windows goes with one --preset, not with bbt and stand"),
        ({"windows": -1}, "--windows is -1, and has to be at least 1"),
        ({"windows": 0}, "--windows is 0"),
        ({"seeds": 0}, "--seeds is empty"),
        ({"bits": []}, "--bits is empty: give at least one value"),
        ({"group_sizes": []}, "--group-size is empty"),
        ({"nsamples": 0}, "--nsamples is 0, and has to be at least 1"),
        ({"nsamples": -1}, "--nsamples is -1"),
        ({"seqlen": 1}, "--seqlen is 1, and has to be at least 2"),
        ({"seqlen": 4096}, "--seqlen 4096 is longer than the 128 positions of the model"),
        ({"task_limit": 0}, "--task-limit is 0"),
        ({"external_tools": ["nobody"]}, "there is no external tool 'nobody'"),
        ({"window": 4096}, "does not fit a model of 128 positions"),
        ({"external_tools": ["llama.cpp:Q3_K_M"]}, "llama.cpp:Q3_K_M has no type of 2 bits"),
        ({"limits": Limits(workers=0)}, "--workers is 0"),
    ):
        with pytest.raises(gq.InputError, match=message):
            compared(folders["llama"], corpus, out, ["gptq"], **changes)
    with pytest.raises(gq.InputError, match="no text file"):
        compared(folders["llama"], tmp_path / "none.txt", out, ["gptq"])
    for place in (folders["llama"], folders["llama"] / "out"):
        with pytest.raises(gq.InputError, match="lies in the folder of the model"):
            compared(folders["llama"], corpus, place, ["gptq"])
    with pytest.raises(gq.InputError, match="cannot be written"):
        compared(folders["llama"], corpus, corpus / "out", ["gptq"])
    gq.quantize(folders["llama"], "rtn-w4g16", None, tmp_path / "packed")
    with pytest.raises(gq.InputError, match="is already quantized; start from the model in full precision"):
        compared(tmp_path / "packed", corpus, out, ["gptq"])
    assert not out.exists()


def test_two_at_once_in_one_folder_are_refused(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.lock"), pytest.raises(gq.InputError, match=r"another run writes .*out: wait for it"):
        compared(folders["llama"], corpus, tmp_path / "out", [])


def test_a_text_that_is_too_short_leaves_nothing(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(gq.InputError, match="tokens"):
        gq.compare(folders["llama"], [], tmp_path / "new" / "out", tmp_path / "short.txt", corpus, **SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["short.txt"]


def test_another_program_is_asked_and_one_that_is_not_installed_is_a_row(
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    in_process: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tools: Registry[type[ExternalTool]],
) -> None:
    class Program(ExternalTool):
        home, requirements, variants = "owner/name", ("program==1",), {"fast": {}, "slow": {}}

        def problem(self, variant: str, size: Size) -> str:
            return ""

        def run(self, variant: str, task: Task, python: Path) -> ToolResult:
            assert (variant, python, task.size.bits) == ("fast", Path("/python"), 2)
            assert not list(task.out.iterdir())
            return ToolResult(task.model, 2.5, 1000, 3.0, 10**9, {"program": "1"}, 1200, {"total": 900})

    tried: list[Any] = []

    def absent(*given: Any) -> Path:
        tried.append(given)
        raise ExternalToolError("program is not installed: --make-environments")

    tools.add("program", Program)
    monkeypatch.setattr("gyroquant.benchmark.external_tools.environment.python_of", absent)
    found = compared(folders["llama"], corpus, tmp_path, [], external_tools=["program"])
    assert len(tried) == 1  # once for both of its variants
    assert found["cells"][3]["status"] == "refused"
    assert (found["cells"][2]["status"], found["cells"][2]["reason"]) == (
        "refused",
        "program is not installed: --make-environments",
    )
    monkeypatch.setattr("gyroquant.benchmark.external_tools.environment.python_of", lambda *given: Path("/python"))
    found = compared(folders["llama"], corpus, tmp_path, [], external_tools=["program:fast"])
    (score,) = found["cells"][2]["tests"].values()
    assert score["kl"] == pytest.approx(0, abs=1e-9)  # it deployed the original
    assert [found["cells"][2][key] for key in ("true_bits", "bytes", "file_bytes")] == [2.5, 1000, 1200]
    assert found["cells"][2]["weight_bytes"] == {"total": 900}
    assert found["cells"][2]["whole_model_bits"] == 8 * 900 / found["model"]["all_weights"]
    words = shlex.split(found["cells"][2]["command"])
    assert words[words.index("--external-tools") + 1] == "program:fast"
    assert found["cells"][2]["forward_equivalents"] == 3.0 / found["cells"][2]["measured"]["forward_seconds"]
    (row,) = (row for row in found["verdict"][0]["rows"] if row["key"] == found["cells"][2]["key"])
    assert row["gap"] == pytest.approx(0, abs=1e-9)
    assert found["verdict"][0]["baseline"] != found["cells"][2]["key"]


COMMAND = """
import json, sys
import gyroquant as gq
gq.compare(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]))
"""


def start(given: list[Any], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", COMMAND, json.dumps(given), json.dumps(options)])


def test_interrupted_it_goes_on_and_ends_the_same(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared(folders["llama"], corpus, tmp_path / "whole", ["quarot"])
    usual = running.run_in_worker

    def interrupted(spec: Any, log: Path, processes: Any) -> dict[str, Any]:
        if len(in_process) == 5:
            raise KeyboardInterrupt
        return usual(spec, log, processes)

    with monkeypatch.context() as patch:
        patch.setattr(running, "run_in_worker", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(folders["llama"], corpus, tmp_path / "out", ["quarot"])
    assert not (tmp_path / "out" / "comparison.json").exists()
    found = compared(folders["llama"], corpus, tmp_path / "out", ["quarot"])
    assert in_process[3:] == in_process[:3]  # none was run twice
    assert lasting(found) == lasting(whole)


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_the_same(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """The real thing: processes, of which the first is killed as soon as one run is there."""
    given = [str(folders["llama"]), [], str(tmp_path / "out"), str(corpus), str(corpus)]
    first = start(given, SMALL)
    runs = tmp_path / "out" / "cells"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*.json")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (there,) = runs.glob("*.json")
    before = there.read_bytes()
    assert start(given, SMALL).wait() == 0
    assert there.read_bytes() == before
    killed = json.loads((tmp_path / "out" / "comparison.json").read_text())
    undisturbed = gq.compare(folders["llama"], [], tmp_path / "whole", corpus, corpus, **SMALL)
    assert lasting(killed) == lasting(json.loads(json.dumps(undisturbed)))
    assert not list((tmp_path / "out" / "scratch").iterdir())  # what the killed one left is gone


def test_a_run_whose_process_dies_is_started_again_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "count"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho x >> {counter}\nkill -KILL $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(program))
    spec = {"run": {"key": "k", "label": "it"}, "scratch": str(tmp_path), "threads": 1}
    found = worker.run_in_worker(spec, tmp_path / "logs" / "k.log")
    assert found["status"] == "failed"
    assert "SIGKILL" in found["reason"]
    assert counter.read_text() == "x\nx\n"


def test_a_result_tells_what_all_of_its_run_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in_subprocess(module: str, spec: Any, *rest: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return {**spec["run"], "status": "done", "measured": {"seconds": 0.01}}

    monkeypatch.setattr(worker, "run_in_subprocess", run_in_subprocess)
    spec = {"run": {"key": "k"}, "scratch": str(tmp_path), "threads": 1}
    found = worker.run_in_worker(spec, tmp_path / "log")
    assert found["measured"]["seconds"] == 0.01
    assert 0.05 <= found["measured"]["wall_seconds"] < 5
