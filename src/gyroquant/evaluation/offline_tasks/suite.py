"""The offline tasks by name, and how their items are made, stored and read."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gyroquant.calibration.text import Text, load_text
from gyroquant.errors import InputError
from gyroquant.evaluation.offline_tasks.arithmetic import make_arithmetic
from gyroquant.evaluation.offline_tasks.brackets import make_brackets
from gyroquant.evaluation.offline_tasks.cloze import make_cloze
from gyroquant.evaluation.offline_tasks.items import Draw, Item, ItemSet
from gyroquant.evaluation.offline_tasks.python_code import make_code
from gyroquant.evaluation.offline_tasks.spelling import make_spelling

OFFLINE = "offline"
"""The name of all tasks here."""
DEFAULT_ITEMS = 200
"""Items of a task if no number is given."""

_FROM_TEXT: dict[str, Callable[[str, int, Draw], list[Item]]] = {"cloze": make_cloze, "spelling": make_spelling}
_GENERATED: dict[str, Callable[[int, Draw], list[Item]]] = {
    "arithmetic": make_arithmetic,
    "brackets": make_brackets,
    "code": make_code,
}
_DELIMITERS = {"code": "\n"}
TASKS = ("cloze", "arithmetic", "spelling", "code", "brackets")
"""The names of the tasks."""


def split_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The offline tasks among `names`, with `offline` for all of them, and the names that are left. Each once."""
    offline, others = dict[str, None](), dict[str, None]()
    for name in names:
        if name == OFFLINE:
            offline |= dict.fromkeys(TASKS)
        else:
            (offline if name in TASKS else others)[name] = None
    return list(offline), list(others)


def task_text(names: Iterable[str], source: Any = None) -> Text | None:
    """The text that items of the tasks `names` are made from: `source`, or Python's language reference.

    `source` is what `load_text` takes. None if no task needs a text. Raises InputError as `load_text`, for
    conversations, and if there is neither a source nor a reference.
    """
    if not set(names) & set(_FROM_TEXT):
        return None
    if source is not None:
        text = load_text(source, split="test")
        if text.conversations:
            raise InputError(f"items are made from prose, and {text.name} holds conversations: give --task-text FILE")
        return text
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python comes without its language reference: give a text with --task-text FILE"
        ) from error
    return Text(f"the language reference of Python {_python()}", "\n\n".join(topics[name] for name in sorted(topics)))


def make_items(names: Sequence[str], text: Text | None, count: int = DEFAULT_ITEMS, seed: int = 0) -> list[ItemSet]:
    """The items of each task, the same for the same text, count, seed and sources.

    text: the result of `task_text`. A task whose text has too few sentences gets fewer items.
    Raises InputError for a count below 2, and for a text that no item can be made from.
    """
    if count < 2:
        raise InputError(f"--task-items is {count}, and has to be at least 2")
    sets = []
    for name in names:
        draw, source = Draw(seed, name), "generated"
        if name in _FROM_TEXT:
            if text is None:
                raise ValueError(f"the task {name} needs a text")
            items, source = _FROM_TEXT[name](text.content, count, draw), text.name
        else:
            items = _GENERATED[name](count, draw)
        if name == "code":
            source = f"the standard library of Python {_python()}"
        if len(items) < 2:
            raise InputError(
                f"{source} has too few plain sentences for the task {name}: give more prose with --task-text FILE"
            )
        sets.append(ItemSet(name, source, tuple(items), count, _DELIMITERS.get(name, " ")))
    return sets


def _python() -> str:
    return platform.python_version()


def read_items(path: Path) -> list[ItemSet]:
    """Reads items from JSON: a list of what `ItemSet.to_dict` returns."""
    return [ItemSet.from_dict(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


__all__ = ["DEFAULT_ITEMS", "OFFLINE", "TASKS", "make_items", "read_items", "split_names", "task_text"]
