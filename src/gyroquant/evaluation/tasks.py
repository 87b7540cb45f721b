"""Zero-shot tasks through lm-evaluation-harness, on a model as it is deployed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gyroquant.calibration.text import bos_tokens
from gyroquant.errors import InputError

_HARNESS = "lm_eval"


def check_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Any:
    """The harness's tasks, of which `include` may be a folder of more.

    Raises InputError where the harness is not installed, and for a task that it has not.
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

    With `add_bos` every question begins as the tokenizer begins a text; the harness leaves that out by itself. Raises
    InputError where the harness is not installed, a task is unknown, or its data cannot be reached.
    """
    manager = check_tasks(tasks, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
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
            bootstrap_iters=100,  # accuracies have a formula for it; this only asks for it
            verbosity="ERROR",
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise InputError(f"the tasks {', '.join(tasks)} cannot be run here: {error}") from error
    assert found is not None
    return {task: _scores(found["results"][task]) for task in tasks}


def _scores(result: dict[str, Any]) -> dict[str, float]:
    """Normalised accuracy where a task has it, as leaderboards report it, else plain accuracy."""
    name = next((name for name in ("acc_norm", "acc") if f"{name},none" in result), None)
    if name is None:
        raise InputError(f"the task {result.get('alias', '')} measures no accuracy")
    stderr = result.get(f"{name}_stderr,none")
    return {"acc": float(result[f"{name},none"]), "stderr": float(stderr) if isinstance(stderr, float) else 0.0}
