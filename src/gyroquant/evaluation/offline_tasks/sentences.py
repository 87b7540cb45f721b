"""Sentences of a text, and how often its words occur."""

from __future__ import annotations

import re
from collections import Counter

_WRAPPED = 100  # a paragraph without a longer line is wrapped; otherwise every line is a paragraph
_WORDS = (8, 40)  # the shortest and the longest sentence
_END = re.compile(r"(?<=[.!?])\s+(?=[^\W\d_a-z])")
MARKS = ",;:'\"()\u2013\u2014\u2018\u2019\u201c\u201d-"
"""The marks that a plain sentence may have inside, with dashes and curled quotes."""
_PLAIN = re.compile(rf"[^\W\d_](?:[^\W_]|[ {MARKS}])+[.!?]")
_ABBREVIATIONS = {"etc", "vs", "cf", "ca", "approx", "prof", "capt", "figs", "inc", "ltd"}


def sentences(text: str) -> list[str]:
    """The plain sentences of a text: 8 to 40 words with usual punctuation, from a capital letter to a full stop.

    Sentences that occur again, headings, tables and indented paragraphs are left out.
    """
    found: dict[str, None] = {}
    for paragraph in _paragraphs(text):
        for sentence in _split(paragraph):
            count = len(sentence.split())
            if _WORDS[0] <= count <= _WORDS[1] and sentence[0].isupper() and _PLAIN.fullmatch(sentence):
                found.setdefault(sentence)
    return list(found)


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each on one line."""
    result: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines or any(line.startswith(("  ", "\t")) for line in lines):
            continue
        wrapped = max(map(len, lines)) <= _WRAPPED
        result += [" ".join(line.strip() for line in lines)] if wrapped else lines
    return result


def _split(paragraph: str) -> list[str]:
    """The sentences of a paragraph. A point after an initial or an abbreviation does not end one."""
    pieces: list[str] = []
    for piece in _END.split(paragraph):
        if pieces and _is_abbreviation(pieces[-1].split()[-1]):
            pieces[-1] += f" {piece}"
        else:
            pieces.append(piece)
    return [piece for piece in pieces if piece]


def _is_abbreviation(word: str) -> bool:
    bare = word.rstrip(".").lstrip(MARKS)
    return word.endswith(".") and (
        bare.lower() in _ABBREVIATIONS or "." in bare or (bare[:1].isupper() and len(bare) <= 3)
    )


def words(text: str) -> Counter[str]:
    """How often each word in lower case occurs in a text."""
    return Counter(word for word in re.findall(r"[^\W\d_]+", text) if word.islower())


__all__ = ["MARKS", "sentences", "words"]
