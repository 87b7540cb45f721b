"""`gyroquant evaluate --tasks` and `compare --tasks`, as a user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import plain_sentences
import pytest

import gyroquant as gq
from gyroquant.cli import main
from gyroquant.evaluation import tasks
from gyroquant.evaluation.offline_tasks import TASKS

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(plain_sentences.prose(60), encoding="utf-8")
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gyroquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_model_and_its_original(
    folders: dict[str, Path], corpus: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out = tmp_path / "out"
    gq.quantize(folders["llama"], {"name": "two", "weights": {"bits": 2, "group_size": 16, "solver": "rtn"}}, out=out)
    asked = ("--against", folders["llama"], "--tasks", "offline", "--task-items", 6, "--task-text", text, "--json")
    assert call(monkeypatch, "evaluate", out, *asked) == 0
    result = json.loads(capfd.readouterr().out)
    assert "perplexity" not in result
    assert list(result["tasks"]) == list(TASKS)
    assert result["tasks_together"]["items"] == 30
    for facts in result["tasks"].values():
        assert {"acc", "stderr", "interval", "acc_bytes", "chance", "sha256", "source"} <= set(facts)
        assert facts["paired"]["difference"] == pytest.approx(facts["acc"] - facts["original"]["acc"])
    assert result["tasks"]["cloze"]["source"] == "text.txt"
    assert result["harness"]["lm_eval"][0].isdigit()
    assert result["bytes"]["total"] > 0
    more = ("--text", corpus, "--windows", 2, "--window", 16, "--tasks", "brackets", "--task-items", 4)
    assert call(monkeypatch, "evaluate", folders["llama"], *more) == 0
    shown = capfd.readouterr().out
    assert "perplexity" in shown
    assert "brackets" in shown


def test_a_report_with_tasks(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    asked = ("--against", folders["llama"], "--text", corpus, "--windows", 2, "--window", 32, "--tasks", "brackets")
    asked += ("--task-items", 4, "--report", tmp_path / "r", "--prompts", 2, "--prompt-tokens", 8, "--steps", 3)
    assert call(monkeypatch, "evaluate", folders["llama"], *asked) == 0
    shown = capfd.readouterr().out
    assert "verdict" in shown
    assert "accuracy in zero-shot tasks" in shown
    data = json.loads((tmp_path / "r" / "diagnosis.json").read_text())
    assert data["diagnosis"]["verdict"]["kind"] == "level"
    accuracy = data["tasks"]["brackets"]["acc"]
    assert data["tasks"]["brackets"]["paired"]["difference"] == 0
    assert f"| accuracy in brackets | {accuracy:.4f} |" in (tmp_path / "r" / "diagnosis.md").read_text()


def test_a_model_against_itself_does_not_differ(folders: dict[str, Path]) -> None:
    made = [
        gq.evaluate(folders["llama"], against=folders["llama"], tasks=["brackets"], task_items=20) for _ in range(2)
    ]
    assert made[0]["tasks"] == made[1]["tasks"]
    paired = made[0]["tasks"]["brackets"]["paired"]
    assert (paired["gained"], paired["lost"], paired["p"]) == (0, 0, 1.0)
    assert made[0]["tasks_together"] is None


def test_the_calibration_text_is_refused(
    folders: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    calibrated = {
        "name": "g",
        "weights": {"bits": 4, "group_size": 16, "solver": "gptq"},
        "calibration": {"nsamples": 2, "seqlen": 16},
    }
    gq.quantize(folders["llama"], calibrated, text, tmp_path / "out")
    assert call(monkeypatch, "evaluate", tmp_path / "out", "--tasks", "cloze", "--task-text", text) == 1
    assert "is calibrated on text.txt, and items of tasks must not come from that" in capfd.readouterr().err
    assert call(monkeypatch, "evaluate", tmp_path / "out", "--tasks", "brackets", "--task-items", 4, "--json") == 0
    arguments = (folders["llama"], tmp_path / "o", "--recipes", "rtn", "--text", text, "--test", text, "--seqlen", 16)
    options = (
        "--window",
        16,
        "--nsamples",
        2,
        "--group-size",
        16,
        "--bits",
        4,
        "--tasks",
        "spelling",
        "--task-text",
        text,
    )
    assert call(monkeypatch, "compare", *arguments, *options) == 1
    assert "this comparison is calibrated on text.txt" in capfd.readouterr().err


@pytest.mark.slow  # three processes that each import the harness
def test_a_comparison_has_offline_tasks(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    grid = {"bits": [4], "group_sizes": [16], "nsamples": 2, "seqlen": 16, "window": 16, "windows": 2}
    asked = {"tasks": ["brackets"], "task_limit": 5, "task_seed": 3}
    comparison = gq.compare(folders["llama"], ["rtn"], tmp_path / "out", corpus, corpus, **grid, **asked)
    done = [run for run in comparison["cells"] if run["status"] == "done"]
    assert done
    digests = {run["tasks"]["brackets"]["sha256"] for run in done}
    (items,) = (tmp_path / "out").rglob("items-*.json")
    assert len(digests) == 1
    assert items.stem.removeprefix("items-") in digests.pop()
    assert "± " in (tmp_path / "out" / "comparison.md").read_text()


def test_tasks_of_the_harness_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(tasks, "_manager", lambda include, own: asked.append(own) or _Manager())
    assert tasks.plan_tasks(["hellaswag", "brackets"], count=3).harness == ("hellaswag",)
    tasks.plan_tasks(["brackets"], count=3)
    assert asked == [True, False]  # the harness's own tasks are listed only if one is asked for


class _Manager:
    all_tasks, all_tags, all_groups = ("hellaswag",), (), ()
