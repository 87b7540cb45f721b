"""Sentences are whole, and what is not a plain sentence is left out."""

from __future__ import annotations

from gyroquant.evaluation.offline_tasks.sentences import sentences, words

FIRST = "The quiet farmer watched the narrow bridge near the famous castle."
SECOND = "Did the teacher really visit the crowded market without her coat?"


def test_lines_are_paragraphs_unless_they_are_wrapped() -> None:
    assert sentences(f"{FIRST} {SECOND}") == [FIRST, SECOND]
    wrapped = "\n".join(f"{FIRST} {SECOND}"[start : start + 60] for start in range(0, 132, 60))
    assert sentences(wrapped.replace("\n", "")) == [FIRST, SECOND]
    broken = FIRST.replace("narrow ", "narrow\n")
    assert sentences(broken) == [FIRST]
    long = "A caption of a picture that does not end with a full stop and stands before a text, " + "so " * 10 + "on"
    assert sentences(f"{long}\n{FIRST}") == [FIRST]


def test_initials_and_abbreviations_do_not_end_a_sentence() -> None:
    sentence = "In that year Dr. J. Smith of the University met the others, e.g. Jones, in the old library."
    assert sentences(f"{sentence} {FIRST}") == [FIRST] or sentence in sentences(f"{sentence} {FIRST}")
    assert not any(found.startswith(("Smith", "Jones")) for found in sentences(sentence))


def test_what_is_no_plain_sentence_is_left_out() -> None:
    others = [
        "= The title of an article about a farmer and a bridge =",
        "    The indented code of a page that is not a sentence at all.",
        "The value of x | y is not written in a plain way, as everyone sees.",
        "too short.",
        "And this one has no full stop at its end, which leaves it out",
    ]
    assert sentences("\n\n".join([*others, FIRST, FIRST])) == [FIRST]


def test_words_in_lower_case_are_counted() -> None:
    assert words("The cat, the dog; THE cat's tail") == {"cat": 2, "the": 1, "dog": 1, "s": 1, "tail": 1}
