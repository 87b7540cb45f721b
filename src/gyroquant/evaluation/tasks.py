"""Zero-shot tasks of lm-evaluation-harness, on a model as it is deployed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gyroquant.calibration.text import bos_tokens
from gyroquant.errors import InputError

_HARNESS = "lm_eval"


def check_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Any:
    """The harness's task manager. `include` is a folder with more tasks.

    Raises InputError if the harness is not installed, or does not have a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("tasks need lm-evaluation-harness: pip install 'gyroquant[tasks]'") from error
    logging.getLogger(_HARNESS).setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    return manager


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    add_bos: bool = True,
    batch_size: int = 8,
    include: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of a transformers model in each task, and its standard error, over the first `limit` questions.

    With `add_bos`, every question begins with the tokenizer's BOS tokens; the harness itself leaves them out. Raises
    InputError if the harness is not installed, a task is unknown, or its data cannot be reached.
    """
    manager = check_tasks(tasks, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        results = simple_evaluate(
            HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                backend="causal",
                add_bos_token=add_bos and bool(bos_tokens(tokenizer)),
            ),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=100,  # turns on standard errors; those of accuracies come from a formula
            verbosity="ERROR",
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise InputError(f"the tasks {', '.join(tasks)} cannot be run here: {error}") from error
    assert results is not None
    return {task: _scores(results["results"][task]) for task in tasks}


def _scores(result: dict[str, Any]) -> dict[str, float]:
    """Normalised accuracy, as leaderboards report it, if the task has it; else plain accuracy."""
    name = next((name for name in ("acc_norm", "acc") if f"{name},none" in result), None)
    if name is None:
        raise InputError(f"the task {result.get('alias', '')} does not measure accuracy: choose another")
    stderr = result.get(f"{name}_stderr,none")
    return {"acc": float(result[f"{name},none"]), "stderr": float(stderr) if isinstance(stderr, float) else 0.0}
