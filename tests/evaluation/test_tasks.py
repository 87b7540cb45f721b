"""Tasks are scored by lm-evaluation-harness on the deployed model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.calibration.text import Text
from gyroquant.evaluation import tasks
from gyroquant.evaluation.accuracy import wilson
from gyroquant.evaluation.offline_tasks import ItemSet, make_items
from gyroquant.evaluation.paired import mcnemar
from gyroquant.evaluation.tasks import (
    TaskPlan,
    TaskScore,
    check_tasks,
    plan_tasks,
    run_harness,
    score_tasks,
    together,
)

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_missing_harness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    monkeypatch.setattr(tasks, "_managers", {})
    with pytest.raises(gq.InputError, match=r"pip install 'gyroquant\[tasks\]'"):
        check_tasks(["hellaswag"])


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of ten questions: which word a tiny model would write."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    lines = []
    for i in range(10):
        ids = torch.tensor([[1, 3 + i, 20 + i]])
        order = model(ids).logits[0, -1, 3:].argsort(descending=True) + 3
        right, wrong = (tokenizer.decode([int(order[k])]) for k in (0, 40))
        question = f"w{i} w{17 + i}"
        lines.append({"question": question, "choices": [wrong, right], "label": int(i < 7)})
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "words.jsonl"))
    return tmp_path


def test_a_task_is_scored(words: Path) -> None:
    found = score_tasks(tiny_models.build("llama"), tiny_models.tokenizer(), ["words"], include=words)
    assert found["words"].facts["acc"] == pytest.approx(0.7)
    assert 0 < found["words"].facts["stderr"] < 0.5
    assert found["words"].right == (1.0,) * 7 + (0.0,) * 3
    assert found["words"].facts["interval"] == pytest.approx(list(wilson(0.7, 10)))
    limited = score_tasks(tiny_models.build("llama"), tiny_models.tokenizer(), ["words"], include=words, limit=5)
    assert limited["words"].facts["acc"] == 1.0


def test_an_unknown_task_is_told(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks._managers, (str(words), True), few_tasks(words))
    with pytest.raises(gq.InputError, match="has no task 'wordz'; did you mean 'words'"):
        check_tasks(["wordz"], words)
    with pytest.raises(gq.InputError, match="has no task 'clozee'; did you mean 'cloze'"):
        check_tasks(["clozee"], words)
    with pytest.raises(gq.InputError, match="some_words labels several tasks"):
        check_tasks(["some_words"], words)


def few_tasks(folder: Path) -> Any:
    """The harness's task manager with the tasks of a folder alone: its own ten thousand take many seconds to list."""
    from lm_eval import tasks as harness

    (folder / "other.yaml").write_text(TASK.replace("task: words", "task: others\ntag: some_words").format(data="x"))
    return harness.TaskManager(include_path=str(folder), include_defaults=False)


SETS = make_items(["arithmetic", "brackets"], None, 20)


def answering(likelihood: Callable[[ItemSet, int, int], float]) -> Any:
    """A model of the harness with a likelihood of each choice: of the set, the item's number and the choice's."""
    harness = pytest.importorskip("lm_eval.api.model", reason="lm-evaluation-harness is not installed")
    known = {
        (item.question, entry.delimiter + choice): (entry, number, place)
        for entry in SETS
        for number, item in enumerate(entry.items)
        for place, choice in enumerate(item.choices)
    }

    class Answers(harness.LM):
        def loglikelihood(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            return [(likelihood(*known[request.args]), False) for request in requests]

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    return Answers()


def test_a_model_that_knows_some_answers_has_that_accuracy() -> None:
    """It knows the first 13 of each task, and is wrong about the others."""

    def likelihood(entry: ItemSet, number: int, place: int) -> float:
        return -1.0 if (place == entry.items[number].answer) == (number < 13) else -2.0

    model = answering(likelihood)
    scores = run_harness(model, items=SETS)
    for entry in SETS:
        facts = scores[entry.name].facts
        assert facts["acc"] == 13 / 20
        assert facts["stderr"] == pytest.approx((13 * 7 / 400 / 19) ** 0.5)
        assert facts["interval"] == pytest.approx(list(wilson(13 / 20, 20)))
        assert scores[entry.name].right == (1.0,) * 13 + (0.0,) * 7
        assert (facts["chance"], facts["items"], facts["items_asked"]) == (0.25, 20, 20)
        assert facts["sha256"] == entry.sha256
    whole = together(list(scores.values()))
    assert whole is not None
    assert whole.facts["acc"] == 13 / 20
    assert (whole.facts["items"], whole.facts["chance"]) == (40, 0.25)
    assert together([scores["brackets"]]) is None
    harness = tasks._evaluated(model, [tasks._harness_task(SETS[0])], check_tasks([]))["results"]["arithmetic"]
    assert harness["acc,none"] == scores["arithmetic"].facts["acc"]
    assert harness["acc_stderr,none"] == pytest.approx(scores["arithmetic"].facts["stderr"])


def test_likelihoods_are_also_compared_by_bytes() -> None:
    """A model to which every byte is equally likely prefers short choices, and by bytes has no preference."""
    model = answering(lambda entry, number, place: -float(len(entry.items[number].choices[place])))
    scores = run_harness(model, items=SETS)
    for entry in SETS:
        shortest = [min(range(4), key=lambda place, item=item: len(item.choices[place])) for item in entry.items]
        expected = [float(place == item.answer) for place, item in zip(shortest, entry.items, strict=True)]
        assert list(scores[entry.name].right or ()) == expected
        first = sum(item.answer == 0 for item in entry.items) / 20  # of equal ones, the first
        assert scores[entry.name].facts["acc_bytes"] == first


def test_two_models_are_compared_item_by_item() -> None:
    def knowing(count: int) -> dict[str, TaskScore]:
        known = lambda entry, number, place: float(place == entry.items[number].answer and number < count)  # noqa: E731
        return run_harness(
            answering(lambda *at: known(*at) - (at[2] == (SETS[0].items[at[1]].answer + 1) % 4)), items=SETS[:1]
        )

    ours, theirs = knowing(12)["arithmetic"], knowing(20)["arithmetic"]
    facts = ours.against(theirs)
    assert facts["original"]["acc"] == theirs.facts["acc"]
    assert facts["paired"] == mcnemar(ours.right or (), theirs.right or ())
    assert facts["paired"]["gained"] == 0
    assert facts["paired"]["lost"] > 0
    assert TaskScore({"acc": 0.5}).against(theirs)["paired"] is None


def test_items_of_the_calibration_text_are_refused() -> None:
    text = Text("mine.txt", "words")
    plan = TaskPlan(text=text)
    plan.check_held_out(None, "OUT")
    plan.check_held_out({"name": "other.txt", "sha256": "0"}, "OUT")
    TaskPlan().check_held_out(text.about(), "OUT")
    with pytest.raises(gq.InputError, match=r"OUT is calibrated on mine.txt.*--task-text FILE"):
        plan.check_held_out(text.about(), "OUT")


def test_a_plan_has_the_items_of_offline_tasks(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "check_tasks", lambda names: None)
    plan = plan_tasks(["words", "brackets"], count=5, seed=2)
    assert plan.harness == ("words",)
    assert plan.items == tuple(make_items(["brackets"], None, 5, 2))
    assert (plan.text, plan.limit) == (None, 5)
    assert plan_tasks(["words"]).limit is None
