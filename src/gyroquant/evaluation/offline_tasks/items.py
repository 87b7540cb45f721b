"""Items of multiple choice, their digest, and the random draws that make them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

CHOICES = 4
"""Choices of every item. Chance is one over it."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Item:
    """A question with its choices. A model answers with the choice that it finds most likely after the question.

    - question: the text before the choice.
    - choices: the texts, all different.
    - answer: the index of the right one.

    Raises ValueError for choices that are not distinct, and for an answer that is none of them.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(set(self.choices)) != len(self.choices) or not 0 <= self.answer < len(self.choices):
            raise ValueError(f"choices {self.choices} with the answer {self.answer} are not an item")


@dataclass(frozen=True)
class ItemSet:
    """The items of one task.

    - name: of the task.
    - source: what the items were made from, for people.
    - asked: how many items were requested. There may be fewer.
    - delimiter: what stands between question and choice.
    """

    name: str
    source: str
    items: tuple[Item, ...]
    asked: int
    delimiter: str = " "

    @property
    def sha256(self) -> str:
        """The digest of everything that a model sees, and of the answers."""
        rows = [[item.question, list(item.choices), item.answer] for item in self.items]
        return hashlib.sha256(json.dumps([self.name, self.delimiter, rows]).encode()).hexdigest()

    @property
    def chance(self) -> float:
        """The mean accuracy of random answers."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def to_dict(self) -> dict[str, Any]:
        """The items as plain data, for `from_dict`."""
        rows = [
            {"question": item.question, "choices": list(item.choices), "answer": item.answer} for item in self.items
        ]
        names = ("name", "source", "asked", "delimiter")
        return {name: getattr(self, name) for name in names} | {"items": rows}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ItemSet:
        """The items of `to_dict`. Raises ValueError for data that are no items."""
        items = tuple(Item(row["question"], tuple(row["choices"]), row["answer"]) for row in data["items"])
        return cls(data["name"], data["source"], items, data["asked"], data["delimiter"])


class Draw:
    """Random draws that are the same in every version of Python, from a seed and the name of a task.

    Python promises this of `random.Random.random` with an integer as the seed, but not of `shuffle` or `sample`.
    """

    def __init__(self, seed: int, name: str):
        self._random = random.Random(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big"))

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        return int(self._random.random() * count)

    def between(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def choice(self, values: Sequence[Value]) -> Value:
        """One of the values."""
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[Value]) -> list[Value]:
        """All values in random order (Fisher and Yates)."""
        result = list(values)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def item(self, question: str, right: str, wrong: Sequence[str]) -> Item:
        """An item whose right choice is at any place with the same probability."""
        choices = self.shuffled([right, *wrong])
        return Item(question, tuple(choices), choices.index(right))


__all__ = ["CHOICES", "Draw", "Item", "ItemSet"]
