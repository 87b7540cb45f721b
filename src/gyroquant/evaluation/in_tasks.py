"""What `evaluate` measures in tasks: the scores of a model and, if there is one, of its original on the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from gyroquant.evaluation.tasks import TaskPlan, TaskScore, score_tasks, together


def in_tasks(
    loads: Iterable[Callable[[], PreTrainedModel]], plan: TaskPlan, tokenizer: Any, add_bos: bool
) -> dict[str, Any]:
    """The scores by task (`tasks`), those of all offline tasks together (`tasks_together`), and the `harness`.

    loads: functions that load a model whole: the measured one and, for paired tests, the original. One is in memory
        at a time.
    add_bos: whether every question begins with the tokenizer's BOS tokens.

    Raises InputError as `score_tasks`.
    """
    scores = [
        score_tasks(load(), tokenizer, plan.harness, items=plan.items, limit=plan.limit, add_bos=add_bos)
        for load in loads
    ]
    ours, originals = scores[0], scores[1] if len(scores) > 1 else {}
    whole, original = together(list(ours.values())), together(list(originals.values()))
    return {
        "harness": {"lm_eval": version("lm_eval")},
        "tasks": {name: _facts(score, originals.get(name)) for name, score in ours.items()},
        "tasks_together": None if whole is None else _facts(whole, original),
    }


def _facts(score: TaskScore, original: TaskScore | None) -> dict[str, Any]:
    return dict(score.facts) if original is None else score.against(original)


__all__ = ["in_tasks"]
