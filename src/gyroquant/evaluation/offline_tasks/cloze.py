"""The last word of a sentence, among words of like frequency and length that end other sentences of the text."""

from __future__ import annotations

from gyroquant.evaluation.offline_tasks.items import CHOICES, Draw, Item
from gyroquant.evaluation.offline_tasks.sentences import MARKS, sentences, words

_SHORTEST = 3  # letters of a word
_LENGTHS = 2  # lengths of two words differ by at most this many letters
_TIMES = 2  # frequencies of two words differ by at most this factor


def make_cloze(text: str, count: int, draw: Draw) -> list[Item]:
    """At most `count` items from the sentences of a text.

    A wrong word ends another sentence, is at most 2 letters longer or shorter, occurs in the text at least half and at
    most twice as often, does not occur in the sentence, and neither begins with another choice nor is the beginning of
    one. Sentences without three such words are left out.
    """
    frequencies, ends = words(text), dict[str, str]()
    for sentence in sentences(text):
        head, _, last = sentence[:-1].rpartition(" ")
        if last.isalpha() and last.islower() and len(last) >= _SHORTEST:
            ends[head] = last
    known, items = sorted(set(ends.values())), list[Item]()
    for head in draw.shuffled(list(ends)):
        if len(items) == count:
            break
        wrong = _wrong(ends[head], head, known, frequencies, draw)
        if wrong is not None:
            items.append(draw.item(head, ends[head], wrong))
    return items


def _wrong(right: str, head: str, known: list[str], frequencies: dict[str, int], draw: Draw) -> list[str] | None:
    """Three wrong words for a sentence. None if there are fewer."""
    inside = {word.strip(MARKS).lower() for word in head.split()}
    chosen = [right]
    for word in draw.shuffled([word for word in known if _alike(word, right, frequencies) and word not in inside]):
        if not any(word.startswith(other) or other.startswith(word) for other in chosen):
            chosen.append(word)
        if len(chosen) == CHOICES:
            return chosen[1:]
    return None


def _alike(word: str, right: str, frequencies: dict[str, int]) -> bool:
    often, rarely = sorted((frequencies[word], frequencies[right]), reverse=True)
    return abs(len(word) - len(right)) <= _LENGTHS and often <= _TIMES * rarely


__all__ = ["make_cloze"]
