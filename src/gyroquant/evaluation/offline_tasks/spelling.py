"""A word of a sentence among its misspellings, each followed by the rest of the sentence."""

from __future__ import annotations

import re

from gyroquant.evaluation.offline_tasks.items import CHOICES, Draw, Item
from gyroquant.evaluation.offline_tasks.sentences import sentences, words

_SHORTEST = 6  # letters of a word: a change inside a long word seldom makes another word
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TRIES = 50


def make_spelling(text: str, count: int, draw: Draw) -> list[Item]:
    """At most `count` items, one word of each sentence of a text.

    A misspelling differs by one letter that is left out, added or replaced, or by two neighbours that change places
    (edit distance 1 in the sense of Damerau, 1964). The first and the last letter stay: other endings make other words.
    Misspellings that occur in the text as words are not used.
    """
    known, items = words(text), list[Item]()
    for sentence in draw.shuffled(sentences(text)):
        if len(items) == count:
            break
        found = [match for match in re.finditer(r"(?<= )[a-z]+(?=[ ,;.!?])", sentence) if len(match[0]) >= _SHORTEST]
        if not found:
            continue
        word = draw.choice(found)
        wrong = _misspellings(word[0], set(known), draw)
        if len(wrong) == CHOICES - 1:
            rest = sentence[word.end() :]
            items.append(draw.item(sentence[: word.start() - 1], word[0] + rest, [other + rest for other in wrong]))
    return items


def _misspellings(word: str, known: set[str], draw: Draw) -> list[str]:
    """Three misspellings of a word, or fewer."""
    chosen: list[str] = []
    for _ in range(_TRIES):
        other = _misspelt(word, draw)
        if other != word and other not in known and other not in chosen:
            chosen.append(other)
        if len(chosen) == CHOICES - 1:
            break
    return chosen


def _misspelt(word: str, draw: Draw) -> str:
    """The word with one change after its first and before its last letter. It may be the same word."""
    at, kind = draw.between(1, len(word) - 2), draw.below(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + draw.choice(_LETTERS) + word[at:]
    if kind == 2:
        return word[:at] + draw.choice(_LETTERS) + word[at + 1 :]
    at = min(at, len(word) - 3)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


__all__ = ["make_spelling"]
