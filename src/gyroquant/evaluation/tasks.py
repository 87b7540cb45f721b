"""Zero-shot tasks in lm-evaluation-harness, on a model as it is deployed: the harness's own, and the offline tasks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from gyroquant.calibration.text import Text, bos_tokens
from gyroquant.errors import InputError
from gyroquant.evaluation.accuracy import accuracy
from gyroquant.evaluation.offline_tasks import (
    DEFAULT_ITEMS,
    OFFLINE,
    TASKS,
    ItemSet,
    make_items,
    split_names,
    task_text,
)
from gyroquant.evaluation.paired import mcnemar
from gyroquant.registry import nearest

_HARNESS = "lm_eval"
_NO_SEEDS = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}  # nothing here is random
_managers: dict[tuple[str | None, bool], Any] = {}


def check_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Any:
    """The harness's task manager for `tasks`, of the harness or offline. `include` is a folder with more tasks.

    Raises InputError if the harness is not installed, or if there is no such task: the error names the nearest one.
    """
    _, others = split_names(tasks)
    manager = _manager(None if include is None else str(include), bool(others))
    for task in others:
        if task in manager.all_tags and task not in manager.all_groups:
            raise InputError(f"{task} labels several tasks: give their names (`lm-eval ls tasks` lists them)")
        if task not in manager.all_tasks:
            close = nearest(task, [OFFLINE, *TASKS, *manager.all_tasks])
            raise InputError(
                f"lm-evaluation-harness has no task {task!r}; did you mean {close!r}? `lm-eval ls tasks` lists its "
                f"tasks; {OFFLINE} or one of {', '.join(TASKS)} needs no network"
            )
    return manager


def _manager(include: str | None, own: bool) -> Any:
    """The task manager. With `own` it knows the tasks of the harness, some ten thousand, which takes many seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("tasks need lm-evaluation-harness: pip install 'gyroquant[tasks]'") from error
    logging.getLogger(_HARNESS).setLevel(logging.ERROR)
    if (include, own) not in _managers:
        _managers[include, own] = TaskManager(include_path=include, include_defaults=own)
    return _managers[include, own]


@dataclass(frozen=True)
class TaskPlan:
    """What to ask models.

    - harness: names of the harness's tasks.
    - items: the items of the offline tasks.
    - text: the text that some of these were made from, if any.
    - limit: at most this many questions of each of the harness's tasks. None: all.
    """

    harness: tuple[str, ...] = ()
    items: tuple[ItemSet, ...] = ()
    text: Text | None = None
    limit: int | None = None

    def check_held_out(self, calibration: Mapping[str, Any] | None, label: str) -> None:
        """Raises InputError if the text is the calibration text of a model or a comparison, `label`.

        `calibration` has the `name` and `sha256` of that text; None if it is not known.
        """
        if self.text is not None and calibration is not None and calibration.get("sha256") == self.text.sha256:
            raise InputError(
                f"{label} is calibrated on {calibration.get('name')}, and items of tasks must not come from that "
                "text: give another one with --task-text FILE"
            )


def plan_tasks(names: Sequence[str], source: Any = None, count: int | None = None, seed: int = 0) -> TaskPlan:
    """Checks tasks by name, and makes the items of the offline ones.

    source: the text to make items from, see `load_text`. Default: Python's language reference.
    count: items of each offline task (default 200), and at most as many questions of each other task (default all).
    seed: the seed of the items.

    Raises InputError for unknown names, for a missing harness, and if items cannot be made.
    """
    check_tasks(names)
    offline, others = split_names(names)
    text = task_text(offline, source)
    items = make_items(offline, text, DEFAULT_ITEMS if count is None else count, seed)
    return TaskPlan(tuple(others), tuple(items), text, count)


@dataclass(frozen=True)
class TaskScore:
    """The answers of a model to the questions of one task.

    - facts: accuracy (`acc`, the metric that `metric` names), its standard error and 95 % interval; for offline tasks
      also the accuracy by bytes, chance, and what the items are.
    - right: 1 for each right answer and 0 for a wrong one, in the order of the questions. None for a group of tasks
      and for other metrics.
    """

    facts: Mapping[str, Any]
    right: tuple[float, ...] | None = None

    def against(self, original: TaskScore) -> dict[str, Any]:
        """The facts, those of the original (`original`), and the paired test of their difference (`paired`)."""
        comparable = self.right is not None and original.right is not None
        names = ("acc", "stderr", "interval", "acc_bytes", "stderr_bytes", "interval_bytes")
        return {
            **self.facts,
            "original": {name: original.facts[name] for name in names if name in original.facts},
            "paired": mcnemar(self.right, original.right) if comparable else None,  # type: ignore[arg-type]
        }


def together(scores: Sequence[TaskScore]) -> TaskScore | None:
    """The score of the items of several offline tasks together. None for fewer than two tasks.

    The interval is one of a single share. It is too wide if the tasks are not equally hard, and never too narrow.
    """
    known = [score for score in scores if score.right is not None and "chance" in score.facts]
    if len(known) < 2:
        return None
    right = tuple(answer for score in known for answer in score.right or ())
    chance = sum(score.facts["chance"] * score.facts["items"] for score in known) / len(right)
    return TaskScore({**accuracy(right), "items": len(right), "chance": chance}, right)


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = (),
    *,
    items: Sequence[ItemSet] = (),
    limit: int | None = None,
    add_bos: bool = True,
    batch_size: int = 8,
    include: str | Path | None = None,
) -> dict[str, TaskScore]:
    """The scores of a transformers model in each task.

    tasks: names of the harness's tasks, with the first `limit` questions. Default: none, and all questions.
    items: the offline tasks, see `make_items`. Default: none.
    add_bos: whether every question begins with the tokenizer's BOS tokens; the harness itself leaves them out.

    Raises InputError if the harness is not installed, a task is unknown, or its data cannot be reached.
    """
    check_tasks(tasks, include)
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        backend="causal",
        add_bos_token=add_bos and bool(bos_tokens(tokenizer)),
    )
    return run_harness(harness_model, tasks, items=items, limit=limit, include=include)


def run_harness(
    harness_model: Any,
    tasks: Sequence[str] = (),
    *,
    items: Sequence[ItemSet] = (),
    limit: int | None = None,
    include: str | Path | None = None,
) -> dict[str, TaskScore]:
    """As `score_tasks`, for any model of the harness (`lm_eval.api.model.LM`)."""
    manager = check_tasks(tasks, include)
    scores: dict[str, TaskScore] = {}
    if items:
        results = _evaluated(harness_model, [_harness_task(entry) for entry in items], manager, **_NO_SEEDS)
        scores |= {entry.name: _offline_score(entry, results["samples"][entry.name]) for entry in items}
    if tasks:
        results = _evaluated(harness_model, list(tasks), manager, limit=limit)
        scores |= {task: _score(results["results"][task], results["samples"].get(task)) for task in tasks}
    return scores


def _evaluated(harness_model: Any, tasks: list[Any], manager: Any, **options: Any) -> dict[str, Any]:
    """The results of the harness, with a sample for every question."""
    from lm_eval import simple_evaluate

    try:
        results = simple_evaluate(
            harness_model,
            tasks=tasks,
            task_manager=manager,
            bootstrap_iters=100,  # turns on standard errors; those of accuracies come from a formula
            **options,
        )
    except (OSError, ConnectionError, ValueError) as error:
        names = ", ".join(str(getattr(task, "task_name", task)) for task in tasks)
        raise InputError(
            f"the tasks {names} cannot be run here: {error}; the tasks {OFFLINE} need no network"
        ) from error
    assert results is not None
    return results


def _harness_task(items: ItemSet) -> Any:
    """A task of the harness with these items: the likelihood of each choice after the question."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class LocalTask(ConfigurableTask):
        """A task whose items are here, and not fetched."""

        def download(self, *args: Any, **options: Any) -> None:
            self.dataset = {"test": Dataset.from_list(items.to_dict()["items"])}

    return LocalTask(
        config={
            "task": items.name,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": _question,
            "doc_to_choice": _choices,
            "doc_to_target": _answer,
            "target_delimiter": items.delimiter,
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def _question(document: Mapping[str, Any]) -> str:
    return str(document["question"])


def _choices(document: Mapping[str, Any]) -> list[str]:
    return list(document["choices"])


def _answer(document: Mapping[str, Any]) -> int:
    return int(document["answer"])


def _in_order(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples in the order of the questions, with the results of one filter if the task has several."""
    filters = {sample.get("filter", "none") for sample in samples}
    kept = "none" if "none" in filters else min(filters)
    return sorted((s for s in samples if s.get("filter", "none") == kept), key=lambda sample: sample["doc_id"])


def _offline_score(items: ItemSet, samples: Sequence[Mapping[str, Any]]) -> TaskScore:
    """Accuracy by log-likelihood, and by log-likelihood over the bytes of the choice."""
    right, by_bytes = list[float](), list[float]()
    for item, sample in zip(items.items, _in_order(samples), strict=True):
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        rates = [likelihood / len(text.encode()) for likelihood, text in zip(likelihoods, item.choices, strict=True)]
        right.append(float(_largest(likelihoods) == item.answer))
        by_bytes.append(float(_largest(rates) == item.answer))
    facts: dict[str, Any] = {"metric": "acc", **accuracy(right)}
    facts |= {"acc_bytes" if key == "acc" else f"{key}_bytes": value for key, value in accuracy(by_bytes).items()}
    facts |= {"chance": items.chance, "items": len(items.items), "items_asked": items.asked}
    return TaskScore({**facts, "source": items.source, "sha256": items.sha256}, tuple(right))


def _largest(values: Sequence[float]) -> int:
    """The index of the largest value: the first one of several, as in the harness."""
    return max(range(len(values)), key=lambda index: values[index])


def _score(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] | None) -> TaskScore:
    """Normalised accuracy, as leaderboards report it, if the task has it; else plain accuracy."""
    name = next((name for name in ("acc_norm", "acc") if f"{name},none" in result), None)
    if name is None:
        raise InputError(f"the task {result.get('alias', '')} does not measure accuracy: choose another")
    answers: list[Any] = [sample.get(name) for sample in _in_order(samples or ())]
    if len(answers) >= 2 and set(answers) <= {0, 1}:
        right = tuple(map(float, answers))
        return TaskScore({"metric": name, **accuracy(right), "items": len(right)}, right)
    value, stderr = float(result[f"{name},none"]), result.get(f"{name}_stderr,none")
    error = float(stderr) if isinstance(stderr, float) else 0.0
    reach = NormalDist().inv_cdf(0.975) * error
    return TaskScore({"metric": name, "acc": value, "stderr": error, "interval": [value - reach, value + reach]})


__all__ = ["TaskPlan", "TaskScore", "check_tasks", "plan_tasks", "run_harness", "score_tasks", "together"]
