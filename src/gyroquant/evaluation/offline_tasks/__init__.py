"""Zero-shot tasks whose items are made here: from a text, from Python's own sources, and from generators."""

from gyroquant.evaluation.offline_tasks.items import CHOICES, Draw, Item, ItemSet
from gyroquant.evaluation.offline_tasks.suite import (
    DEFAULT_ITEMS,
    OFFLINE,
    TASKS,
    make_items,
    read_items,
    split_names,
    task_text,
)

__all__ = [
    "CHOICES",
    "DEFAULT_ITEMS",
    "OFFLINE",
    "TASKS",
    "Draw",
    "Item",
    "ItemSet",
    "make_items",
    "read_items",
    "split_names",
    "task_text",
]
