"""Nested brackets and quotes: the order in which the open ones are closed."""

from __future__ import annotations

from gyroquant.evaluation.offline_tasks.items import CHOICES, Draw, Item

_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">", '"': '"', "'": "'"}
_QUOTES = "\"'"
_DEPTH = (3, 5)  # how many are open at the end of the question
_LONGEST = 16  # signs of a question


def make_brackets(count: int, draw: Draw) -> list[Item]:
    """`count` different items. The question opens brackets and quotes and closes some, as "( [ ] { \\" ( ) '".

    The choices close the open ones in four different orders, of which one is right. A quote opens only where the same
    quote is not open, so there is one reading.
    """
    items: dict[str, Item] = {}
    while len(items) < count:
        signs, opened = _signs(draw)
        if signs is None:
            continue
        right = " ".join(_PAIRS[sign] for sign in reversed(opened))
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            other = " ".join(draw.shuffled(right.split()))
            if other != right and other not in wrong:
                wrong.append(other)
        question = " ".join(signs)
        items.setdefault(question, draw.item(question, right, wrong))
    return list(items.values())


def _signs(draw: Draw) -> tuple[list[str] | None, list[str]]:
    """A question's signs, and those that are open at its end. None if it is too long, or has fewer than four orders."""
    signs, opened, depth = list[str](), list[str](), draw.between(*_DEPTH)
    while len(signs) < _LONGEST:
        if opened and draw.below(5) < 2:
            signs.append(_PAIRS[opened.pop()])
        else:
            opened.append(draw.choice([sign for sign in _PAIRS if sign not in _QUOTES or sign not in opened]))
            signs.append(opened[-1])
        if len(opened) == depth:
            return (signs if len(set(opened)) > 2 else None), opened
    return None, opened


__all__ = ["make_brackets"]
