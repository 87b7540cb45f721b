"""The right word is the sentence's own; the others are like it in length and frequency, and never its beginning."""

from __future__ import annotations

import plain_sentences
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.evaluation.offline_tasks import Draw
from gyroquant.evaluation.offline_tasks.cloze import make_cloze
from gyroquant.evaluation.offline_tasks.sentences import sentences, words

TEXT = plain_sentences.prose(150)


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_items_are_sentences_of_the_text(seed: int) -> None:
    counts, known = words(TEXT), set(sentences(TEXT))
    items = make_cloze(TEXT, 20, Draw(seed, "cloze"))
    assert len({item.question for item in items}) == len(items) == 20
    for item in items:
        right = item.choices[item.answer]
        assert [f"{item.question} {choice}." in known for choice in item.choices].count(True) >= 1
        assert f"{item.question} {right}." in known
        for choice in set(item.choices) - {right}:
            assert choice in plain_sentences.NOUNS
            assert abs(len(choice) - len(right)) <= 2
            assert 1 / 2 <= counts[choice] / counts[right] <= 2
            assert choice not in item.question.split()
        assert not any(a != b and a.startswith(b) for a in item.choices for b in item.choices)


def test_a_text_of_few_sentences_has_fewer_items() -> None:
    assert make_cloze(plain_sentences.prose(3), 20, Draw(0, "cloze")) == []
    assert 0 < len(make_cloze(plain_sentences.prose(40), 200, Draw(0, "cloze"))) <= 40


@pytest.mark.parametrize("count", [1, 7])
def test_fewer_items_are_the_first_of_more(count: int) -> None:
    assert make_cloze(TEXT, count, Draw(5, "cloze")) == make_cloze(TEXT, 20, Draw(5, "cloze"))[:count]
