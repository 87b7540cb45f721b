"""Texts on which tokenizers show that they differ: added tokens and what is beside them, spaces, digits, scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST = 24  # added tokens without special rules that are tried; some models reserve hundreds
TEXTS: Mapping[str, str] = {
    "nothing": "",
    "prose": "The quick brown fox jumps over the lazy dog, and it's 7 o'clock: time to go home.",
    "a space in front": " leading and",
    "a space at the end": "trailing ",
    "several spaces": "a  b   c    d",
    "line ends": "one\ntwo\n\nthree\r\n\r\n four\n  five\n",
    "tabs": "\tif x:\n\t\treturn\t1",
    "digits": "1 12 123 1234 12345 3.14159 2026-11-28 1,000,000",
    "contractions": "don't I'll we've they're it's he'd I'm DON'T WE'LL",
    "letters beside digits": "abc123def x2 H2O 4th",
    "punctuation": "Hello!!! (what?) -- \"quoted\" 'single' ... [x] {y} <z> a/b\\c #1 @me $5 50%",
    "code": "def f(x):\n    return x**2 + 1  # comment\n\nfor (int i = 0; i < n; ++i) { a[i] += b->c; }",
    "accents": "Ünïcödé é ŝ naïve café Ångström",
    "accents of two signs": "e\u0301 a\u0308 n\u0303",
    "Chinese": "你好、世界。今天天气很好",
    "Japanese": "こんにちは世界、カタカナ",
    "Russian": "Привет, мир! Как дела?",
    "Arabic": "مرحبا بالعالم",
    "Hindi": "नमस्ते दुनिया",
    "Korean": "안녕하세요 세계",
    "emoji": "ok 🙂👍🏽 👩‍👩‍👧",
    "spaces of other widths": "a\u00a0b\u2003c\u3000d",
    "zero bytes and controls": "a\u0001b\u200bc",
}
_AROUND = ("{}", "a{}b", "a {} b", "{} b", "a {}", " {}", "{}{}", "{} {}", "a\n{}\nb", "x  {}  y", "1{}2")


def added_tokens(tokenizer: Any) -> Iterator[Any]:
    """The added tokens of a tokenizer, those with rules of their own first, in the order of their ids."""
    found = sorted(tokenizer.added_tokens_decoder.items())
    ruled = [token for _, token in found if rules(token)]
    yield from ruled
    yield from [token for _, token in found if not rules(token)][:_MOST]


def rules(token: Any) -> list[str]:
    """What an added token is found by besides its letters."""
    return [rule for rule in ("lstrip", "rstrip", "single_word") if getattr(token, rule)]


def texts(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Texts by what is in them; those with an added token by its name."""
    yield from TEXTS.items()
    for token in added_tokens(tokenizer):
        for around in _AROUND:
            yield f"the added token {token.content}", around.replace("{}", token.content)
