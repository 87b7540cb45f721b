"""Misspellings are one edit from the word, no words themselves, and the sentence goes on as in the text."""

from __future__ import annotations

import plain_sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.evaluation.offline_tasks import Draw
from gyroquant.evaluation.offline_tasks.sentences import sentences, words
from gyroquant.evaluation.offline_tasks.spelling import make_spelling

TEXT = plain_sentences.prose(60)


def edits(word: str) -> set[str]:
    """All texts at edit distance 1, as Norvig lists them: deletes, transposes, replaces, inserts."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    splits = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    deletes = {a + b[1:] for a, b in splits if b}
    transposes = {a + b[1] + b[0] + b[2:] for a, b in splits if len(b) > 1}
    replaces = {a + c + b[1:] for a, b in splits if b for c in letters}
    inserts = {a + c + b for a, b in splits for c in letters}
    return (deletes | transposes | replaces | inserts) - {word}


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_only_the_right_choice_is_a_sentence_of_the_text(seed: int) -> None:
    known, counts = set(sentences(TEXT)), words(TEXT)
    items = make_spelling(TEXT, 15, Draw(seed, "spelling"))
    assert len({item.question + item.choices[item.answer] for item in items}) == len(items) == 15
    for item in items:
        assert [f"{item.question} {choice}" in known for choice in item.choices] == [
            place == item.answer for place in range(4)
        ]
        right = item.choices[item.answer].split()[0].rstrip(".")
        for place in set(range(4)) - {item.answer}:
            wrong = item.choices[place].split()[0].rstrip(".")
            assert wrong in edits(right)
            assert wrong not in counts
            assert (wrong[0], wrong[-1]) == (right[0], right[-1])
            assert item.choices[place].removeprefix(wrong) == item.choices[item.answer].removeprefix(right)
